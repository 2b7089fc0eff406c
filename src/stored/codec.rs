//! Encodes and decodes stored responses and kept requests.

use bytes::Bytes;
use http::{HeaderMap, Method, Request};

use crate::stored::{
    framing::{seal, unseal},
    request::{self, KeptRequest, UnreadableRequest},
    response::{self, StoredResponse, UnreadableResponse},
};

/// Encodes and decodes responses and requests for a node. The one place that knows the outer form
/// of the bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Codec;

impl Codec {
    /// Encodes a response.
    pub(crate) fn response(&self, response: &StoredResponse) -> Bytes {
        seal(response::VERSION, &response.payload())
    }

    /// Decodes a response.
    pub(crate) fn read_response(&self, stored: &Bytes) -> Result<StoredResponse, UnreadableResponse> {
        let payload = unseal(response::VERSION, stored)?;
        StoredResponse::from_payload(payload).ok_or(UnreadableResponse::Damaged)
    }

    /// Encodes a request, as it is sent again.
    pub(crate) fn request(&self, method: &Method, target: &str, headers: &HeaderMap, body: &Bytes) -> Bytes {
        seal(request::VERSION, &request::payload(method, target, headers, body))
    }

    /// Decodes a request.
    pub(crate) fn read_request(&self, kept: &Bytes) -> Result<Request<Bytes>, UnreadableRequest> {
        let payload = unseal(request::VERSION, kept)?;
        request::from_payload(payload).ok_or(UnreadableRequest::Damaged)
    }
}

/// Faces of the codec for operators, stores and tests.
impl StoredResponse {
    /// Encodes the response: one version byte, eight bytes of checksum, then length-prefixed
    /// fields.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        Codec.response(self)
    }

    /// Decodes what [`encode`](Self::encode) made.
    ///
    /// # Errors
    ///
    /// [`UnreadableResponse`] if the version or the kind of body is unknown, or the checksum does
    /// not match.
    pub fn decode(encoded: &Bytes) -> Result<Self, UnreadableResponse> {
        Codec.read_response(encoded)
    }
}

impl KeptRequest {
    /// The request as it is sent again: method, original URI, the headers that were kept, and the
    /// body.
    ///
    /// # Errors
    ///
    /// [`UnreadableRequest`] if it is damaged or was kept by an unknown version of this crate.
    pub fn decode(&self) -> Result<Request<Bytes>, UnreadableRequest> {
        Codec.read_request(&self.request)
    }
}
