//! Requests that are kept so that they can be sent again.

mod encoded;
mod keep;
mod settings;

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::Request;

pub use self::{encoded::UnreadableRequest, settings::KeptRequests};
use crate::{Consumer, IdempotencyKey, RecordId, response::Length};

/// A request that is kept until its record is completed, as a store shows it.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeptRequest {
    /// The record of the request.
    pub record_id: RecordId,
    /// The consumer of that record.
    pub consumer: Consumer,
    /// The key of that record.
    pub key: IdempotencyKey,
    /// The encoded request.
    pub request: Bytes,
    /// How often it was sent again.
    pub tries: u32,
    /// What an operator must know.
    pub attention: Option<String>,
}

impl KeptRequest {
    /// A request that was not sent again yet.
    #[must_use]
    pub fn new(record_id: RecordId, consumer: Consumer, key: IdempotencyKey, request: Bytes) -> Self {
        Self { record_id, consumer, key, request, tries: 0, attention: None }
    }

    /// The request as it is sent again: method, original URI, the headers that were kept, and the body.
    ///
    /// # Errors
    ///
    /// [`UnreadableRequest`] if it is damaged or was kept by an unknown version of this crate.
    pub fn decode(&self) -> Result<Request<Bytes>, UnreadableRequest> {
        encoded::decode(&self.request)
    }
}

/// Shows how long the request is, and nothing of it.
impl fmt::Debug for KeptRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptRequest")
            .field("record_id", &self.record_id)
            .field("consumer", &self.consumer)
            .field("request", &Length(&self.request))
            .field("tries", &self.tries)
            .field("attention", &self.attention)
            .finish_non_exhaustive()
    }
}

/// What becomes of a kept request that was sent again.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum RequestUpdate {
    /// It is sent again, if its record is still not completed.
    SendAgain {
        /// After this time.
        after: Duration,
        /// Whether it was sent. If not, that it was taken does not count as a try.
        tried: bool,
    },
    /// It is not sent any more and waits for an operator, who is told this.
    NeedsAttention(String),
    /// It is not needed any more, because its record is completed or gone, and is deleted.
    Done,
}
