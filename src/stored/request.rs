//! Requests that are kept so that they can be sent again.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri};

use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    redact::Length,
    stored::{
        framing::{Unsealed, get_bytes, get_headers, put_bytes, put_headers},
        record::RecordId,
    },
};

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
    /// The number of times it was sent again.
    pub tries: u32,
    /// The reason why it waits for an operator, if it does.
    pub attention: Option<String>,
}

impl KeptRequest {
    /// A request that has not been sent again.
    #[must_use]
    pub fn new(record_id: RecordId, consumer: Consumer, key: IdempotencyKey, request: Bytes) -> Self {
        Self { record_id, consumer, key, request, tries: 0, attention: None }
    }
}

/// Shows the length of the request, and nothing of its content.
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

/// The next step for a kept request that was sent again.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "a store must handle every one")]
pub enum RequestUpdate {
    /// Send it again, unless its record is completed by then.
    SendAgain {
        /// After this time.
        after: Duration,
        /// `true` if it was sent. If it was only taken, that does not count as a try.
        tried: bool,
    },
    /// Do not send it any more: it waits for an operator, for this reason.
    NeedsAttention(String),
    /// Delete it: its record is completed or gone.
    Done,
}

/// Kept bytes cannot be read as a request. They are never sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnreadableRequest {
    /// Written by a version of this crate that this one does not know.
    #[error("the kept request has version {0}, which this version of tower-idempotency does not know")]
    Version(u8),
    /// Cut or changed.
    #[error("the kept request is damaged")]
    Damaged,
}

impl From<Unsealed> for UnreadableRequest {
    fn from(error: Unsealed) -> Self {
        match error {
            Unsealed::Version(version) => Self::Version(version),
            Unsealed::Damaged => Self::Damaged,
        }
    }
}

/// The fields of a request, each with its length before it.
pub(super) fn payload(method: &Method, target: &str, headers: &HeaderMap, body: &Bytes) -> Vec<u8> {
    let mut payload = Vec::new();
    put_bytes(&mut payload, method.as_str().as_bytes());
    put_bytes(&mut payload, target.as_bytes());
    put_headers(&mut payload, headers);
    put_bytes(&mut payload, body);
    payload
}

pub(super) fn from_payload(mut input: Bytes) -> Option<Request<Bytes>> {
    let method = Method::from_bytes(&get_bytes(&mut input)?).ok()?;
    let uri = Uri::from_maybe_shared(get_bytes(&mut input)?).ok()?;
    let headers = get_headers(&mut input)?;
    let mut request = Request::new(get_bytes(&mut input)?);
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    input.is_empty().then_some(request)
}

pub(super) const VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use http::HeaderValue;

    use super::*;
    use crate::stored::codec::Codec;

    fn encoded(headers: &HeaderMap, body: &[u8]) -> Bytes {
        Codec.request(&Method::PATCH, "/a/%20b?c=d&e", headers, &Bytes::copy_from_slice(body))
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_kept(
            body in proptest::collection::vec(any::<u8>(), 0..512),
            tenants in proptest::collection::vec(proptest::collection::vec(0x80..=0xffu8, 0..9), 0..4),
        ) {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", HeaderValue::from_static("a/b"));
            for tenant in tenants {
                headers.append("x-tenant", HeaderValue::from_bytes(&tenant).unwrap());
            }
            let decoded = Codec.read_request(&encoded(&headers, &body)).unwrap();
            prop_assert_eq!(decoded.method(), Method::PATCH);
            prop_assert_eq!(decoded.uri(), "/a/%20b?c=d&e");
            prop_assert_eq!(decoded.headers(), &headers);
            prop_assert_eq!(&decoded.body()[..], &body[..]);
        }

        #[test]
        fn a_changed_byte_or_a_cut_is_noticed(at in 0usize..64, cut in 0usize..64) {
            let encoded = encoded(&HeaderMap::new(), &[7; 64]);
            let mut changed = encoded.to_vec();
            changed[at] ^= 0x55;
            prop_assert!(Codec.read_request(&changed.into()).is_err());
            prop_assert!(Codec.read_request(&encoded.slice(..cut)).is_err());
        }
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut encoded = encoded(&HeaderMap::new(), b"").to_vec();
        encoded[0] = 9;
        assert_eq!(Codec.read_request(&encoded.into()).unwrap_err(), UnreadableRequest::Version(9));
    }
}
