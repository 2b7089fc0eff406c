//! The fingerprint: tells a retry from a different request with the same key.

mod canonical_json;

use std::{fmt, sync::Arc};

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderName, Uri, header, request::Parts};
use serde::Serialize;
use sha2::{Digest, Sha256};

pub use canonical_json::InvalidPointer;

/// A digest of a request, together with the scheme that it was computed in.
///
/// It is opaque to stores, which compare it byte by byte.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint(Bytes);

impl Fingerprint {
    /// Wraps a fingerprint that was read from a store.
    #[must_use]
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The bytes to write to a store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The fingerprint of an attempt outside HTTP. No request has the same one.
    pub(crate) fn of_arguments(arguments: &(impl Serialize + ?Sized)) -> Option<Self> {
        let digest = canonical_digest(arguments)?;
        Some(Self([&[ARGUMENTS_VERSION][..], &digest].concat().into()))
    }

    fn new(scheme: SchemeId, digest: &[u8]) -> Self {
        Self([&scheme[..], digest].concat().into())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint(..)")
    }
}

/// Computes the fingerprint of a request.
///
/// The default is a SHA-256 over method, original path and query, content type and body bytes, each
/// with its length before it. `Host`, `User-Agent`, the headers of tracing and authentication, and
/// the framing of the body do not count.
///
/// In a nested axum router, the original path comes from `OriginalUri` (feature `axum`). Elsewhere,
/// use [`with_target`](Self::with_target) if an outer service changes the URI.
///
/// # Changing options
///
/// A record remembers the scheme of its fingerprint: version, options and secret. A retry of a
/// record in another scheme is compared in that scheme if [`add_previous`](Self::add_previous)
/// names it, and is refused with 409 `fingerprint-unknown` otherwise. So when you change options or
/// secrets, add the old value, and remove it after one retention.
///
/// ```
/// # use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore};
/// let fingerprinter = Fingerprinter::default()
///     .add_header(http::HeaderName::from_static("x-tenant"))
///     .canonical_json(["/metadata/sent_at"])?
///     .add_previous(Fingerprinter::default());
/// let layer = IdempotencyLayer::new(MemoryStore::new()).with_fingerprint(fingerprinter);
/// # Ok::<(), tower_idempotency::errors::InvalidPointer>(())
/// ```
#[derive(Clone)]
pub struct Fingerprinter {
    headers: Vec<HeaderName>,
    payload: Payload,
    secret: Option<Secret>,
    target: Arc<Target>,
    previous: Vec<Fingerprinter>,
}

type Target = dyn Fn(&Parts) -> String + Send + Sync;
type Custom = dyn Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync;
type SchemeId = [u8; 9];

#[derive(Clone)]
enum Payload {
    Bytes,
    CanonicalJson(Vec<canonical_json::Pointer>),
    Custom(u32, Arc<Custom>),
    None,
}

#[derive(Clone)]
struct Secret {
    id: u32,
    key: Vec<u8>,
}

impl Default for Fingerprinter {
    fn default() -> Self {
        Self {
            headers: Vec::new(),
            payload: Payload::Bytes,
            secret: None,
            target: Arc::new(original_target),
            previous: Vec::new(),
        }
    }
}

impl Fingerprinter {
    /// Covers method, path and query only. Requests with an equal key to one endpoint are retries,
    /// even if their bodies differ.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::none();
    /// ```
    #[must_use]
    pub fn none() -> Self {
        Self { payload: Payload::None, ..Self::default() }
    }

    /// Covers method, path and query, and the result of `digest` instead of content type and body.
    ///
    /// Use another `version` whenever the function changes.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::custom(1, |_parts, body| body.trim_ascii().into());
    /// ```
    #[must_use]
    pub fn custom(version: u32, digest: impl Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self { payload: Payload::Custom(version, Arc::new(digest)), ..Self::default() }
    }

    /// Compares JSON bodies by their meaning, and leaves out the members at these JSON pointers
    /// ([RFC 6901]).
    ///
    /// The order of members, white space and escapes do not count. Numbers are compared as they are
    /// written: `1` and `1.0` differ, and no digit is lost. A body that is not JSON, repeats a
    /// member or nests deeper than 32 levels is compared byte by byte.
    ///
    /// [RFC 6901]: https://www.rfc-editor.org/rfc/rfc6901
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::default().canonical_json(["/metadata/sent_at"])?;
    /// # Ok::<(), tower_idempotency::errors::InvalidPointer>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidPointer`] if one of the texts is not a JSON pointer to a member.
    pub fn canonical_json<'a>(
        mut self,
        excluded: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, InvalidPointer> {
        let pointers = excluded.into_iter().map(canonical_json::Pointer::parse).collect::<Result<_, _>>()?;
        self.payload = Payload::CanonicalJson(pointers);
        Ok(self)
    }

    /// Covers another header: all its lines, in their order.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::default()
    ///     .add_header(http::HeaderName::from_static("x-tenant"));
    /// ```
    #[must_use]
    pub fn add_header(mut self, name: HeaderName) -> Self {
        self.headers.push(name);
        self
    }

    /// Computes an HMAC with this secret instead of a plain digest. A person who reads the table
    /// then cannot test guesses of a body.
    ///
    /// To rotate the secret, use a new `id` with the new secret, and give the old pair to
    /// [`add_previous`](Self::add_previous).
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::default()
    ///     .keyed(2, "the new secret")
    ///     .add_previous(Fingerprinter::default().keyed(1, "the old secret"));
    /// ```
    #[must_use]
    pub fn keyed(mut self, id: u32, secret: impl Into<Vec<u8>>) -> Self {
        self.secret = Some(Secret { id, key: secret.into() });
        self
    }

    /// Takes path and query from this closure. Default: axum's original URI if there is one, else
    /// the URI of the request.
    ///
    /// The closure is not part of the scheme: when it changes, retries of earlier requests are
    /// refused with 422 `key-reused`.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::default()
    ///     .with_target(|parts| format!("/v1{}", parts.uri.path()));
    /// ```
    #[must_use]
    pub fn with_target(mut self, target: impl Fn(&Parts) -> String + Send + Sync + 'static) -> Self {
        self.target = Arc::new(target);
        self
    }

    /// Reads the records whose fingerprints were computed by another value of this type. See
    /// [Changing options](Self#changing-options).
    #[must_use]
    pub fn add_previous(mut self, previous: Fingerprinter) -> Self {
        self.previous.push(previous);
        self
    }

    /// The headers that are covered, without the content type.
    pub(crate) fn headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.headers.iter()
    }

    /// Computes the fingerprint of a request.
    pub(crate) fn fingerprint(&self, parts: &Parts, body: &Bytes) -> Fingerprint {
        let mut input = Input::new(self.secret.as_ref());
        input.field(parts.method.as_str().as_bytes());
        input.field((self.target)(parts).as_bytes());
        for name in &self.headers {
            let lines: Vec<_> = parts.headers.get_all(name).iter().collect();
            // The count tells one empty line from no line.
            input.length(lines.len());
            lines.iter().for_each(|line| input.field(line.as_bytes()));
        }
        self.payload.add_to(&mut input, parts, body);
        Fingerprint::new(self.scheme(), &input.digest())
    }

    /// Computes the fingerprint in the scheme of a record; `None` if that scheme is unknown here.
    pub(crate) fn fingerprint_like(
        &self,
        record: &Fingerprint,
        parts: &Parts,
        body: &Bytes,
    ) -> Option<Fingerprint> {
        // The own scheme first: it fits all records but those from before a change.
        std::iter::once(self)
            .chain(&self.previous)
            .find(|scheme| record.0.starts_with(&scheme.scheme()))
            .map(|scheme| scheme.fingerprint(parts, body))
    }

    /// Version of the algorithm, digest of the options, id of the secret.
    fn scheme(&self) -> SchemeId {
        let mut options = Input::new(None);
        self.headers.iter().for_each(|name| options.field(name.as_str().as_bytes()));
        options.length(self.headers.len());
        options.field(if self.secret.is_some() { b"hmac" } else { b"hash" });
        self.payload.describe(&mut options);
        let mut scheme = [ALGORITHM_VERSION; 9];
        // Four bytes tell the few schemes of one application apart.
        scheme[1..5].copy_from_slice(&options.digest()[..4]);
        scheme[5..].copy_from_slice(&self.secret.as_ref().map_or(0, |secret| secret.id).to_be_bytes());
        scheme
    }
}

impl fmt::Debug for Fingerprinter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fingerprinter")
            .field("headers", &self.headers)
            .field("secret_id", &self.secret.as_ref().map(|secret| secret.id))
            .field("previous", &self.previous.len())
            .finish_non_exhaustive()
    }
}

impl Payload {
    fn add_to(&self, input: &mut Input, parts: &Parts, body: &Bytes) {
        match self {
            Self::None => {}
            Self::Custom(_, digest) => input.field(&digest(parts, body)),
            Self::Bytes => input.content(parts, body),
            Self::CanonicalJson(excluded) => match canonical_json::canonicalize(body, excluded) {
                Some(canonical) => input.content(parts, &canonical),
                // Ambiguous JSON is compared byte by byte: parsers disagree about its meaning.
                None => input.content(parts, body),
            },
        }
    }

    fn describe(&self, options: &mut Input) {
        match self {
            Self::Bytes => options.field(b"bytes"),
            Self::None => options.field(b"none"),
            Self::Custom(version, _) => {
                options.field(b"custom");
                options.field(&version.to_be_bytes());
            }
            Self::CanonicalJson(excluded) => {
                options.field(b"json");
                excluded.iter().for_each(|pointer| options.field(pointer.as_str().as_bytes()));
            }
        }
    }
}

/// Digests fields with their lengths, without a copy of the body. Two different sequences of fields
/// are never digested as the same bytes.
enum Input {
    Plain(Sha256),
    Keyed(Hmac<Sha256>),
}

impl Input {
    #[expect(clippy::expect_used, reason = "RFC 2104 defines HMAC for keys of any length")]
    fn new(secret: Option<&Secret>) -> Self {
        match secret {
            None => Self::Plain(Sha256::new()),
            Some(secret) => {
                Self::Keyed(Hmac::new_from_slice(&secret.key).expect("an HMAC takes keys of any length"))
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        match self {
            Self::Plain(digest) => digest.update(bytes),
            Self::Keyed(mac) => mac.update(bytes),
        }
    }

    fn length(&mut self, length: usize) {
        self.bytes(&(length as u64).to_be_bytes());
    }

    fn field(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.bytes(bytes);
    }

    fn content(&mut self, parts: &Parts, body: &[u8]) {
        let content_type = parts.headers.get(header::CONTENT_TYPE);
        self.field(content_type.map_or(&[], |value| value.as_bytes()));
        self.field(body);
    }

    fn digest(self) -> Vec<u8> {
        match self {
            Self::Plain(digest) => digest.finalize().to_vec(),
            Self::Keyed(mac) => mac.finalize().into_bytes().to_vec(),
        }
    }
}

/// A digest of the canonical JSON of a value; `None` if it has none.
pub(crate) fn canonical_digest(value: &(impl Serialize + ?Sized)) -> Option<Bytes> {
    let json = serde_json::to_vec(value).ok()?;
    let canonical = canonical_json::canonicalize(&json, &[])?;
    Some(Bytes::copy_from_slice(&Sha256::digest(canonical)))
}

/// The URI as the client sent it.
pub(crate) fn original_uri(parts: &Parts) -> &Uri {
    #[cfg(feature = "axum")]
    let uri = parts.extensions.get::<axum::extract::OriginalUri>().map_or(&parts.uri, |original| &original.0);
    #[cfg(not(feature = "axum"))]
    let uri = &parts.uri;
    uri
}

fn original_target(parts: &Parts) -> String {
    let uri = original_uri(parts);
    uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string)
}

const ALGORITHM_VERSION: u8 = 1;
// The high bit is never set in the version of a request's fingerprint.
const ARGUMENTS_VERSION: u8 = 0x81;

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut builder = http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    fn differs(a: (&Parts, &'static str), b: (&Parts, &'static str)) -> bool {
        let fingerprinter = Fingerprinter::default();
        fingerprinter.fingerprint(a.0, &a.1.into()) != fingerprinter.fingerprint(b.0, &b.1.into())
    }

    #[test]
    fn the_digest_is_over_fields_with_their_lengths() {
        let post = request("POST", "/pay?x=1", &[("content-type", "a/b"), ("x-tenant", "t")]);
        let mut input = Vec::new();
        for field in ["POST", "/pay?x=1", "", "t", "a/b", "2000"] {
            // The lines of a header are counted, too: the empty field stands for that count.
            let length = if field.is_empty() { 1 } else { field.len() as u64 };
            input.extend([&length.to_be_bytes(), field.as_bytes()].concat());
        }
        let plain = Fingerprinter::default().add_header(HeaderName::from_static("x-tenant"));
        let digest =
            |fingerprinter: &Fingerprinter| fingerprinter.fingerprint(&post, &"2000".into()).0.slice(9..);
        assert_eq!(digest(&plain)[..], Sha256::digest(&input)[..]);
        let mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap().chain_update(&input);
        assert_eq!(digest(&plain.keyed(1, "secret"))[..], mac.finalize().into_bytes()[..]);
    }

    #[test]
    fn method_path_query_type_and_body_count() {
        let post = request("POST", "/pay?x=1", &[("content-type", "a/b")]);
        assert!(differs((&post, "1"), (&post, "2")));
        assert!(differs((&post, ""), (&request("PATCH", "/pay?x=1", &[("content-type", "a/b")]), "")));
        assert!(differs((&post, ""), (&request("POST", "/pay?x=2", &[("content-type", "a/b")]), "")));
        assert!(differs((&post, ""), (&request("POST", "/pay?x=1", &[("content-type", "a/c")]), "")));
    }

    #[test]
    fn host_user_agent_and_authority_do_not_count() {
        let one =
            request("POST", "http://a/pay", &[("host", "a"), ("user-agent", "x"), ("traceparent", "1")]);
        let two = request("POST", "/pay", &[("host", "b"), ("authorization", "y")]);
        assert!(!differs((&one, "1"), (&two, "1")));
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        let one = request("POST", "/a", &[("content-type", "bc")]);
        let two = request("POST", "/a", &[("content-type", "b")]);
        assert!(differs((&one, "d"), (&two, "cd")));
    }

    #[test]
    fn extra_headers_count_line_by_line() {
        let fingerprinter = Fingerprinter::default().add_header(HeaderName::from_static("x-t"));
        let of = |headers: &[(&str, &str)]| {
            fingerprinter.fingerprint(&request("POST", "/", headers), &Bytes::new())
        };
        assert_ne!(of(&[("x-t", "1")]), of(&[("x-t", "2")]));
        assert_ne!(of(&[("x-t", "1"), ("x-t", "2")]), of(&[("x-t", "12")]));
        assert_ne!(of(&[("x-t", "")]), of(&[]));
    }

    #[test]
    fn json_is_compared_by_meaning() {
        let fingerprinter = Fingerprinter::default().canonical_json(["/at"]).unwrap();
        let of = |body: &'static str| fingerprinter.fingerprint(&request("POST", "/", &[]), &body.into());
        assert_eq!(of(r#"{"a":1,"b":[2,"x"],"at":5}"#), of(r#" {"b":[2, "\u0078"],"a":1}"#));
        assert_ne!(of(r#"{"a":1}"#), of(r#"{"a":1.0}"#));
        assert_ne!(of(r#"{"a":12345678901234567890123}"#), of(r#"{"a":12345678901234567890124}"#));
        assert_ne!(of("not json"), of("not  json"));
    }

    #[test]
    fn secrets_rotate_and_unknown_schemes_are_told() {
        let parts = request("POST", "/", &[]);
        let body = Bytes::from("x");
        let old = Fingerprinter::default().keyed(1, "one");
        let new = Fingerprinter::default().keyed(2, "two");
        let stored = old.fingerprint(&parts, &body);
        assert_ne!(stored, new.fingerprint(&parts, &body));
        assert_eq!(new.fingerprint_like(&stored, &parts, &body), None);
        assert_eq!(new.add_previous(old).fingerprint_like(&stored, &parts, &body), Some(stored.clone()));
        assert_eq!(Fingerprinter::default().fingerprint_like(&stored, &parts, &body), None);
        assert_eq!(Fingerprinter::none().fingerprint_like(&stored, &parts, &body), None);
    }

    #[test]
    fn without_payload_method_and_path_still_count() {
        let none = Fingerprinter::none();
        let of = |uri: &str, body: &'static str| none.fingerprint(&request("POST", uri, &[]), &body.into());
        assert_eq!(of("/a", "1"), of("/a", "2"));
        assert_ne!(of("/a", "1"), of("/b", "1"));
    }
}
