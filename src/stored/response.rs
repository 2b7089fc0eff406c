//! Stored responses and their bytes.

use std::fmt;

use bytes::{Buf, BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, response::Parts};

use crate::{
    consumer::Consumer,
    redact::Length,
    stored::framing::{Unsealed, get_bytes, get_headers, put_bytes, put_headers},
};

/// A response as it is stored and replayed: status, every header line with its raw bytes, body and
/// trailers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers, without those that belong to one connection and without `Content-Length`, which
    /// is recomputed.
    pub headers: HeaderMap,
    /// The body, or what stands for it.
    pub body: StoredBody,
}

/// The body of a [`StoredResponse`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredBody {
    /// The whole body.
    #[non_exhaustive]
    Kept {
        /// Its bytes.
        data: Bytes,
        /// Its trailers, if it had any.
        trailers: Option<HeaderMap>,
    },
    /// It was too large, endless or a stream. The request was performed; its response cannot be
    /// replayed.
    NotKept,
    /// A representation, from which the response is rendered: see
    /// [`with_representation`](crate::IdempotencyLayer::with_representation).
    Representation(Representation),
}

impl StoredResponse {
    /// A response with a body, as an operator or a test makes it.
    #[must_use]
    pub fn new(status: StatusCode, headers: HeaderMap, body: impl Into<Bytes>) -> Self {
        Self { status, headers, body: StoredBody::Kept { data: body.into(), trailers: None } }
    }

    /// A response that is rendered from a representation whenever it is sent.
    #[must_use]
    pub fn represented(status: StatusCode, representation: Representation) -> Self {
        Self { status, headers: HeaderMap::new(), body: StoredBody::Representation(representation) }
    }

    /// The stored parts of a response's head, with a body.
    pub(crate) fn of(parts: &Parts, body: StoredBody) -> Self {
        Self { status: parts.status, headers: parts.headers.clone(), body }.framed()
    }

    /// Leaves out what belongs to one connection and a body that the status does not allow, and
    /// announces the trailers that are there.
    pub(crate) fn framed(mut self) -> Self {
        remove_connection_headers(&mut self.headers);
        let StoredBody::Kept { data, trailers } = &mut self.body else { return self };
        if has_no_body(self.status) {
            data.clear();
            *trailers = None;
        }
        *trailers = trailers.take().filter(|trailers| !trailers.is_empty());
        if let Some(names) = trailers.as_ref().and_then(names_of) {
            self.headers.insert(header::TRAILER, names);
        }
        self
    }

    pub(crate) fn remove_headers(&mut self, names: &[HeaderName]) {
        for name in names {
            self.headers.remove(name);
        }
    }

    pub(super) fn payload(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_u16(self.status.as_u16());
        put_headers(&mut payload, &self.headers);
        match &self.body {
            StoredBody::NotKept => payload.put_u8(BODY_NOT_KEPT),
            StoredBody::Kept { data, trailers } => {
                payload.put_u8(if trailers.is_some() { BODY_WITH_TRAILERS } else { BODY_KEPT });
                put_bytes(&mut payload, data);
                if let Some(trailers) = trailers {
                    put_headers(&mut payload, trailers);
                }
            }
            StoredBody::Representation(representation) => {
                payload.put_u8(BODY_REPRESENTED);
                put_bytes(&mut payload, representation.data());
            }
        }
        payload
    }

    pub(super) fn from_payload(mut input: Bytes) -> Option<Self> {
        let status = StatusCode::from_u16(input.try_get_u16().ok()?).ok()?;
        let headers = get_headers(&mut input)?;
        let body = match input.try_get_u8().ok()? {
            BODY_NOT_KEPT => StoredBody::NotKept,
            BODY_KEPT => StoredBody::Kept { data: get_bytes(&mut input)?, trailers: None },
            BODY_WITH_TRAILERS => {
                StoredBody::Kept { data: get_bytes(&mut input)?, trailers: Some(get_headers(&mut input)?) }
            }
            BODY_REPRESENTED => StoredBody::Representation(Representation::new(get_bytes(&mut input)?)),
            _ => return None,
        };
        input.is_empty().then_some(Self { status, headers, body })
    }
}

/// Shows the length of the body, and nothing of its content.
impl fmt::Debug for StoredBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept { data, trailers } => {
                f.debug_struct("Kept").field("data", &Length(data)).field("trailers", trailers).finish()
            }
            Self::NotKept => f.write_str("NotKept"),
            Self::Representation(representation) => representation.fmt(f),
        }
    }
}

/// Opaque bytes that are stored instead of a handler's response, for example an id.
/// [`with_representation`](crate::IdempotencyLayer::with_representation) renders the response from
/// them.
///
/// The handler, or a layer around it, puts them into the extensions of its response. A handler of
/// axum returns `(StatusCode::CREATED, Extension(Representation::new(id)))`. If the response is one
/// that is stored (see [`ResultPolicy`](crate::ResultPolicy) and [`Directive`](crate::Directive)),
/// only its status and these bytes are. Its own headers and body are dropped: the client gets the
/// rendered response, first and with every replay.
///
/// In any other response they have no effect, and the response is sent as it is: when the result is
/// not stored, and in requests that are not guarded, because they have no key or run
/// [unprotected](crate::layer::StoreOutage::RunUnprotected). Those requests have no
/// [`Idempotency`](crate::Idempotency) either: require it, or give them a whole response.
#[derive(Clone, PartialEq, Eq)]
pub struct Representation(Bytes);

impl Representation {
    /// A representation of these bytes. Bytes over the
    /// [limit](crate::IdempotencyLayer::with_response_body_limit) are rendered for the first caller
    /// and not stored: retries get 409 `response-not-kept`.
    #[must_use]
    pub fn new(data: impl Into<Bytes>) -> Self {
        Self(data.into())
    }

    /// The bytes.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.0
    }
}

/// Shows the length, and nothing of the content.
impl fmt::Debug for Representation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Representation({} bytes)", self.0.len())
    }
}

/// The input from which a response is rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredRepresentation {
    /// The consumer who sent the request and gets the response.
    pub consumer: Consumer,
    /// The status of the handler's response.
    pub status: StatusCode,
    /// The bytes of the handler's [`Representation`].
    pub data: Bytes,
}

impl StoredRepresentation {
    /// The input for a [`Representation`] of these bytes, as the layer makes it.
    #[must_use]
    pub fn new(consumer: Consumer, status: StatusCode, data: impl Into<Bytes>) -> Self {
        Self { consumer, status, data: data.into() }
    }
}

/// Stored bytes cannot be read as a response. They are never replayed and never lead to another
/// execution.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnreadableResponse {
    /// Written by a version of this crate that this one does not know.
    #[error("the stored response has version {0}, which this version of tower-idempotency does not know")]
    Version(u8),
    /// Cut or changed, or of a kind that this version of the crate does not know.
    #[error(
        "the stored response is damaged, or of a kind that this version of tower-idempotency does not know"
    )]
    Damaged,
}

impl From<Unsealed> for UnreadableResponse {
    fn from(error: Unsealed) -> Self {
        match error {
            Unsealed::Version(version) => Self::Version(version),
            Unsealed::Damaged => Self::Damaged,
        }
    }
}

/// Removes headers that belong to one connection ([RFC 9110, section 7.6.1]) or are computed by the
/// server.
///
/// [RFC 9110, section 7.6.1]: https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
fn remove_connection_headers(headers: &mut HeaderMap) {
    let nominated: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect();
    for name in nominated {
        headers.remove(name);
    }
    for name in CONNECTION_HEADERS {
        headers.remove(name);
    }
}

/// A response of this status ends with its head.
pub(crate) fn has_no_body(status: StatusCode) -> bool {
    status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED)
}

/// The value of a `Trailer` header that names these trailers. `None` if a server would send none of
/// them over HTTP/1.1.
fn names_of(trailers: &HeaderMap) -> Option<HeaderValue> {
    let allowed = trailers.keys().filter(|name| !FORBIDDEN_TRAILERS.contains(name));
    let names: Vec<&str> = allowed.map(HeaderName::as_str).collect();
    (!names.is_empty()).then(|| HeaderValue::from_str(&names.join(", ")).ok())?
}

pub(super) const VERSION: u8 = 1;
const BODY_NOT_KEPT: u8 = 0;
const BODY_KEPT: u8 = 1;
const BODY_WITH_TRAILERS: u8 = 2;
const BODY_REPRESENTED: u8 = 3;

const CONNECTION_HEADERS: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::CONTENT_LENGTH,
];

/// Fields that no trailer may have ([RFC 9110, section 6.5.1]).
///
/// [RFC 9110, section 6.5.1]: https://www.rfc-editor.org/rfc/rfc9110#section-6.5.1
const FORBIDDEN_TRAILERS: [HeaderName; 12] = [
    header::AUTHORIZATION,
    header::CACHE_CONTROL,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::HOST,
    header::MAX_FORWARDS,
    header::SET_COOKIE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stored::framing::seal;

    #[test]
    fn the_bytes_of_a_representation_are_not_shown() {
        assert_eq!(format!("{:?}", Representation::new("secret")), "Representation(6 bytes)");
    }

    fn header_maps() -> impl Strategy<Value = HeaderMap> {
        let name = "[a-z!#$%&'*+.^_`|~0-9-]{1,12}";
        let value = proptest::collection::vec(prop_oneof![Just(b'\t'), 0x20..=0x7eu8, 0x80..=0xffu8], 0..24);
        proptest::collection::vec((name, value), 0..12).prop_map(|lines| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(
                    HeaderName::from_bytes(name.as_bytes()).unwrap(),
                    HeaderValue::from_bytes(&value).unwrap(),
                );
            }
            headers
        })
    }

    fn bodies() -> impl Strategy<Value = StoredBody> {
        let data = || proptest::collection::vec(any::<u8>(), 0..512);
        prop_oneof![
            Just(StoredBody::NotKept),
            (data(), proptest::option::of(header_maps()))
                .prop_map(|(data, trailers)| StoredBody::Kept { data: data.into(), trailers }),
            data().prop_map(|data| StoredBody::Representation(Representation::new(data))),
        ]
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(
            status in 200u16..600,
            headers in header_maps(),
            body in bodies(),
        ) {
            let status = StatusCode::from_u16(status).unwrap();
            let response = StoredResponse { status, headers, body };
            prop_assert_eq!(StoredResponse::decode(&response.encode()).unwrap(), response);
        }

        #[test]
        fn a_changed_byte_or_a_cut_is_noticed(at in 0usize..64, cut in 0usize..64) {
            let encoded = StoredResponse::new(StatusCode::OK, HeaderMap::new(), vec![7; 64]).encode();
            let mut changed = encoded.to_vec();
            changed[at] ^= 0x55;
            prop_assert!(StoredResponse::decode(&changed.into()).is_err());
            prop_assert!(StoredResponse::decode(&encoded.slice(..cut)).is_err());
        }
    }

    #[test]
    fn the_body_is_not_shown() {
        let response = StoredResponse::new(StatusCode::OK, HeaderMap::new(), "secret");
        let shown =
            "StoredResponse { status: 200, headers: {}, body: Kept { data: 6 bytes, trailers: None } }";
        assert_eq!(format!("{response:?}"), shown);
    }

    #[test]
    fn an_unknown_kind_of_body_is_not_read() {
        let with_kind = |kind: u8| {
            let mut payload = vec![0, 200];
            put_headers(&mut payload, &HeaderMap::new());
            payload.push(kind);
            put_bytes(&mut payload, b"id");
            StoredResponse::decode(&seal(VERSION, &payload))
        };
        assert_eq!(
            with_kind(BODY_REPRESENTED),
            Ok(StoredResponse::represented(StatusCode::OK, Representation::new("id")))
        );
        assert_eq!(with_kind(BODY_REPRESENTED + 1), Err(UnreadableResponse::Damaged));
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut encoded = StoredResponse::new(StatusCode::OK, HeaderMap::new(), "x").encode().to_vec();
        encoded[0] = 9;
        assert_eq!(StoredResponse::decode(&encoded.into()), Err(UnreadableResponse::Version(9)));
    }

    #[test]
    fn headers_of_the_connection_are_not_kept() {
        let (parts, ()) = http::Response::builder()
            .header("connection", "x-hop, Close")
            .header("x-hop", "1")
            .header("content-length", "99")
            .header("transfer-encoding", "chunked")
            .header("x-end", "2")
            .body(())
            .unwrap()
            .into_parts();
        let kept = StoredResponse::of(&parts, StoredBody::NotKept).headers;
        assert_eq!(kept.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
    }
}
