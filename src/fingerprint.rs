//! The fingerprint: tells a retry from a different request with the same key.

mod canonical_json;
mod difference;
mod digest;
mod scheme;

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http::{HeaderName, request::Parts};
use serde::Serialize;

pub use self::canonical_json::InvalidPointer;
#[cfg(test)]
pub(crate) use self::canonical_json::canonicalize;
use self::{
    digest::Secret,
    scheme::{ARGUMENTS_VERSION, OptionsId},
};
pub(crate) use self::{digest::canonical_digest, scheme::Comparison};
use crate::head::original_uri;

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
/// the framing of the body do not count. Bytes are compared, not meanings: another charset in the
/// content type, another boundary of a multipart form or another compression of the same data is
/// another request. If clients make such bodies again for each try, cover what they mean with
/// [`custom`](Self::custom), or use [`none`](Self::none).
///
/// A mismatch is refused with 422 `key-reused`, which names the parts that differ and never their
/// values. For that, a fingerprint has two bytes of digest for each part but the body. They are
/// salted with the digest of the whole, and keyed if that is. The body has none, so that guesses of
/// it cannot be tested better than with the digest of the whole.
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
    /// Computed when it is first needed.
    options: OnceLock<OptionsId>,
}

type Target = dyn Fn(&Parts) -> Cow<'_, str> + Send + Sync;
type Custom = dyn Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync;

#[derive(Clone)]
enum Payload {
    Bytes,
    CanonicalJson(Vec<canonical_json::Pointer>),
    Custom(u32, Arc<Custom>),
    None,
}

impl Default for Fingerprinter {
    fn default() -> Self {
        Self {
            headers: Vec::new(),
            payload: Payload::Bytes,
            secret: None,
            target: Arc::new(original_target),
            previous: Vec::new(),
            options: OnceLock::new(),
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
    /// written: `1` and `1.0` differ, and no digit is lost. A body that is not strictly JSON
    /// ([RFC 8259]), repeats a member or nests deeper than 32 levels is compared byte by byte.
    ///
    /// [RFC 6901]: https://www.rfc-editor.org/rfc/rfc6901
    /// [RFC 8259]: https://www.rfc-editor.org/rfc/rfc8259
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
        self.options = OnceLock::new();
        Ok(self)
    }

    /// Covers another header: all its lines, in their order. It reads alike over HTTP/1.1 and
    /// HTTP/2: `Host` is taken from the URI where HTTP/2 has it, and several lines of `Cookie` are
    /// one.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let fingerprinter = Fingerprinter::default()
    ///     .add_header(http::HeaderName::from_static("x-tenant"));
    /// ```
    #[must_use]
    pub fn add_header(mut self, name: HeaderName) -> Self {
        self.headers.push(name);
        self.options = OnceLock::new();
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
        self.options = OnceLock::new();
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
        self.target = Arc::new(move |parts| target(parts).into());
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

fn original_target(parts: &Parts) -> Cow<'_, str> {
    let uri = original_uri(parts);
    match uri.path_and_query() {
        Some(target) if target.as_str().starts_with('/') => target.as_str().into(),
        // Written with the slash that a target in absolute form may lack.
        Some(target) => target.to_string().into(),
        None => uri.path().into(),
    }
}

#[cfg(test)]
mod tests {
    use hmac::{Hmac, KeyInit, Mac};
    use sha2::{Digest, Sha256};

    use super::{scheme::Version, *};

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
    fn the_digest_of_the_first_version_stays_what_it_was() {
        let post = request("POST", "/pay?x=1", &[("content-type", "a/b"), ("x-tenant", "t")]);
        let mut input = Vec::new();
        for field in ["POST", "/pay?x=1", "", "t", "a/b", "2000"] {
            // The lines of a header are counted, too: the empty field stands for that count.
            let length = if field.is_empty() { 1 } else { field.len() as u64 };
            input.extend([&length.to_be_bytes(), field.as_bytes()].concat());
        }
        let plain = Fingerprinter::default().add_header(HeaderName::from_static("x-tenant"));
        let digest = |by: &Fingerprinter| by.in_version(Version::Whole, &post, &"2000".into()).0.slice(9..);
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
    fn a_target_without_a_path_has_a_slash() {
        let bare = request("POST", "http://a.example?x=1", &[]);
        assert!(!differs((&bare, "1"), (&request("POST", "/?x=1", &[]), "1")));
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
    fn the_digest_is_over_parts_with_their_lengths() {
        let post = request("POST", "/pay?x=1", &[("content-type", "a/b"), ("x-tenant", "t")]);
        let field = |bytes: &[u8]| [&(bytes.len() as u64).to_be_bytes(), bytes].concat();
        let lines = |line: &[u8]| field(&[&1u64.to_be_bytes()[..], &field(line)].concat());
        let target = [field(b"POST"), field(b"/pay"), field(b"?x=1")].concat();
        let input = [target, lines(b"t"), lines(b"a/b"), field(b"2000")].concat();
        let plain = Fingerprinter::default().add_header(HeaderName::from_static("x-tenant"));
        let of = |by: &Fingerprinter| by.fingerprint(&post, &"2000".into()).0;
        assert_eq!(of(&plain)[9..41], Sha256::digest(&input)[..]);
        assert_eq!((of(&plain)[0], of(&plain).len()), (2, 9 + 32 + 5 * 2));
        let mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap().chain_update(&input);
        let keyed = plain.clone().keyed(1, "secret");
        assert_eq!(of(&keyed)[9..41], mac.finalize().into_bytes()[..]);
        assert_ne!(of(&keyed)[41..], of(&plain)[41..]);
    }

    #[test]
    fn options_that_change_after_a_use_change_the_scheme() {
        let (parts, body) = (request("POST", "/", &[]), Bytes::from("{}"));
        let used = Fingerprinter::default();
        let stored = used.fingerprint(&parts, &body);
        for changed in [
            used.clone().keyed(1, "one"),
            used.clone().add_header(http::header::HOST),
            used.clone().canonical_json([]).unwrap(),
        ] {
            assert_eq!(changed.compare(&stored, &parts, &body), Comparison::Unknown);
        }
        assert!(matches!(used.compare(&stored, &parts, &body), Comparison::Same(_)));
    }

    #[test]
    fn secrets_rotate_and_unknown_schemes_are_told() {
        let parts = request("POST", "/", &[]);
        let body = Bytes::from("x");
        let old = Fingerprinter::default().keyed(1, "one");
        let new = Fingerprinter::default().keyed(2, "two");
        let stored = old.fingerprint(&parts, &body);
        assert_ne!(stored, new.fingerprint(&parts, &body));
        for other in [new.clone(), Fingerprinter::default(), Fingerprinter::none()] {
            assert_eq!(other.compare(&stored, &parts, &body), Comparison::Unknown);
        }
        let rotated = new.add_previous(old);
        assert_eq!(rotated.compare(&stored, &parts, &body), Comparison::Same(stored));
    }

    #[test]
    fn a_record_is_compared_in_its_version() {
        let plain = Fingerprinter::default().add_header(http::header::HOST);
        let sent = request("POST", "http://a/?q", &[("content-type", "a/b")]);
        let body = Bytes::from("x");
        let stored = plain.in_version(Version::Whole, &sent, &body);
        assert_eq!(plain.compare(&stored, &sent, &body), Comparison::Same(stored.clone()));
        let Comparison::Different(difference) = plain.compare(&stored, &sent, &"y".into()) else { panic!() };
        assert_eq!(difference.to_string(), "method, path, query, header host, content type or body");
    }

    #[test]
    fn the_parts_that_differ_are_named() {
        let plain = Fingerprinter::default().add_header(HeaderName::from_static("x-t"));
        let sent = request("POST", "/a?q=1", &[("content-type", "a/b"), ("x-t", "1")]);
        let others = [
            ("PATCH", "/a?q=1", "a/b", "1", "x", "method"),
            ("POST", "/b?q=1", "a/b", "1", "x", "path"),
            ("POST", "/a", "a/b", "1", "x", "query"),
            ("POST", "/a?q=1", "a/b; charset=utf-8", "1", "x", "content type"),
            ("POST", "/a?q=1", "a/b", "2", "x", "header x-t"),
            ("POST", "/a?q=1", "a/b", "1", "y", "body"),
            ("PUT", "/b?q=1", "a/c", "1", "y", "method, path and content type"),
        ];
        for fingerprinter in
            [plain.clone(), plain.clone().keyed(1, "secret"), plain.canonical_json([]).unwrap()]
        {
            let stored = fingerprinter.fingerprint(&sent, &"x".into());
            for (method, uri, content_type, tenant, body, expected) in others {
                let other = request(method, uri, &[("content-type", content_type), ("x-t", tenant)]);
                let Comparison::Different(difference) = fingerprinter.compare(&stored, &other, &body.into())
                else {
                    panic!("{expected}")
                };
                assert_eq!(difference.to_string(), expected);
            }
        }
    }

    #[test]
    fn equal_parts_of_two_records_do_not_look_equal_and_the_body_has_no_digest_of_its_own() {
        let plain = Fingerprinter::default();
        let of = |body: &'static str| plain.fingerprint(&request("POST", "/", &[]), &body.into()).0;
        assert_ne!(of("1")[41..], of("2")[41..]);
        assert_eq!(of("1").len(), 9 + 32 + 4 * 2);
    }

    #[test]
    fn a_damaged_fingerprint_is_another_one() {
        let (plain, post) = (Fingerprinter::default(), request("POST", "/", &[]));
        let whole = plain.fingerprint(&post, &Bytes::new()).0;
        for length in 0..whole.len() {
            let compared = plain.compare(&Fingerprint(whole.slice(..length)), &post, &Bytes::new());
            assert_eq!(compared == Comparison::Unknown, length < 9, "{length}");
            assert!(!matches!(compared, Comparison::Same(_)));
        }
    }

    #[test]
    fn without_payload_method_and_path_still_count() {
        let none = Fingerprinter::none();
        let of = |uri: &str, body: &'static str| none.fingerprint(&request("POST", uri, &[]), &body.into());
        assert_eq!(of("/a", "1"), of("/a", "2"));
        assert_ne!(of("/a", "1"), of("/b", "1"));
    }
}
