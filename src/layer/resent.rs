//! A kept request on its way through the application again.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    rejection::{Rejection, RejectionCode},
    stored::{record::RecordId, request::KeptRequest},
};

/// In the extensions of a request that a [`Completer`](crate::recovery::Completer) sends. The layer
/// takes record, consumer and key from here. No request from a network can hold it, because only
/// this crate can name it.
#[derive(Clone)]
pub(crate) struct Resent {
    pub(crate) record_id: RecordId,
    pub(crate) consumer: Consumer,
    pub(crate) key: IdempotencyKey,
    passage: Arc<Passage>,
}

/// The traces that a layer leaves on the request.
#[derive(Debug, Default)]
pub(crate) struct Passage {
    reached: OnceLock<()>,
    refused: OnceLock<RejectionCode>,
}

impl Resent {
    pub(crate) fn new(request: &KeptRequest) -> (Self, Arc<Passage>) {
        let passage = Arc::<Passage>::default();
        let KeptRequest { record_id, consumer, key, .. } = request.clone();
        (Self { record_id, consumer, key, passage: Arc::clone(&passage) }, passage)
    }

    /// Notes that a layer has the request.
    pub(crate) fn reached(&self) {
        let _ = self.passage.reached.set(());
    }

    /// Notes that the layer does not run the request.
    pub(crate) fn refused(&self, rejection: &Rejection) {
        let _ = self.passage.refused.set(rejection.code());
    }
}

impl Passage {
    pub(crate) fn was_reached(&self) -> bool {
        self.reached.get().is_some()
    }

    /// The reason why the layer did not run the request, if it did not.
    pub(crate) fn refusal(&self) -> Option<RejectionCode> {
        self.refused.get().copied()
    }
}

impl fmt::Debug for Resent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resent").field("record_id", &self.record_id).finish_non_exhaustive()
    }
}
