//! The API consumer that a key belongs to, and how a request names it.

use std::{
    fmt,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
};

use http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts};
use sha2::{Digest, Sha256};

use crate::{key::hex, redact::TRACING_TARGET};

/// The API consumer that a key belongs to: 1 to 255 bytes of UTF-8 without NUL, compared byte by
/// byte.
///
/// A consumer is a customer, an account or a tenant of your API. Two consumers can use the same key
/// and never see each other's responses. The authentication layer puts the consumer into the
/// request's extensions:
///
/// ```
/// # use tower_idempotency::Consumer;
/// # let mut request = http::Request::new(());
/// request.extensions_mut().insert(Consumer::new("acme")?);
/// # Ok::<(), tower_idempotency::errors::InvalidConsumer>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Consumer(Arc<str>);

impl Consumer {
    /// Makes a consumer with this name.
    ///
    /// # Errors
    ///
    /// [`InvalidConsumer`] if the name is empty, is longer than 255 bytes or contains a NUL.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidConsumer> {
        let name = name.as_ref();
        if name.is_empty() || name.len() > 255 || name.contains('\0') {
            return Err(InvalidConsumer { length: name.len() });
        }
        Ok(Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name is not one that a consumer can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a consumer is 1 to 255 bytes of UTF-8 without NUL; this name has {length} bytes, or a NUL")]
pub struct InvalidConsumer {
    length: usize,
}

type Extract = dyn Fn(&Parts) -> Option<Consumer> + Send + Sync;

/// Finds the consumer of a request.
///
/// A request whose consumer is not found is refused with 403 `consumer-unidentified`. The default
/// looks in this order:
///
/// 1. The [`Consumer`] that an authentication layer has put into the request's extensions.
/// 2. A digest of the `Authorization` header, if its scheme is `Basic` or `Bearer`.
/// 3. The anonymous scope, if the request carries no credential. All such requests share it.
///
/// Every other request is refused, because a guess would either show one user's response to another
/// or protect no request. These are refused:
///
/// * another scheme, because its value may change with each request
/// * more than one `Authorization` line
/// * `Authorization` beside an API key, for example in `X-Api-Key`
/// * `Cookie`, `X-Api-Key` or the like without `Authorization`
///
/// Credentials are never stored, only their digest. The digest has no salt: a person who reads the
/// table or the log can test guesses of a weak `Basic` password.
///
/// A Bearer token that is a JWT changes when it is refreshed, and each token counts as another
/// consumer: a retry with the new token runs again. Use [`extension`](Self::extension) there.
///
/// ```
/// # use tower_idempotency::{ConsumerExtractor, IdempotencyLayer, MemoryStore};
/// let layer = IdempotencyLayer::new(MemoryStore::new())
///     .with_consumer(ConsumerExtractor::extension());
/// ```
#[derive(Clone)]
pub struct ConsumerExtractor {
    extract: Arc<Extract>,
    header: Option<HeaderName>,
}

impl ConsumerExtractor {
    /// Takes the [`Consumer`] from the request's extensions. Recommended.
    ///
    /// An authentication layer puts it there; that layer must be outside this one, so that it runs
    /// first.
    #[must_use]
    pub fn extension() -> Self {
        Self::from_fn(|parts| parts.extensions.get::<Consumer>().cloned())
    }

    /// Takes the value of a header, which a trusted proxy must set: a client that can set it can
    /// name any consumer.
    ///
    /// A request is refused if it has no such header, two of them, or a value that is no
    /// [`Consumer`].
    ///
    /// ```
    /// # use tower_idempotency::ConsumerExtractor;
    /// let extractor = ConsumerExtractor::header(http::HeaderName::from_static("x-account"));
    /// ```
    #[must_use]
    pub fn header(name: HeaderName) -> Self {
        let header = Some(name.clone());
        let by_header = Self::from_fn(move |parts| {
            let value = only_value(&parts.headers, &name)?;
            Consumer::new(std::str::from_utf8(value.as_bytes()).ok()?).ok()
        });
        Self { header, ..by_header }
    }

    /// Calls a closure for each request; `None` refuses the request.
    ///
    /// ```
    /// # use tower_idempotency::{Consumer, ConsumerExtractor};
    /// # #[derive(Clone)] struct Session { account: String }
    /// let extractor = ConsumerExtractor::from_fn(|parts| {
    ///     Consumer::new(&parts.extensions.get::<Session>()?.account).ok()
    /// });
    /// ```
    #[must_use]
    pub fn from_fn(extract: impl Fn(&Parts) -> Option<Consumer> + Send + Sync + 'static) -> Self {
        Self { extract: Arc::new(extract), header: None }
    }

    /// Puts all requests into one scope. Use it only if the API has a single consumer.
    ///
    /// Two clients that send an equal key and an equal request get the same response.
    ///
    /// ```
    /// # use tower_idempotency::{Consumer, ConsumerExtractor};
    /// let extractor = ConsumerExtractor::shared(Consumer::new("internal")?);
    /// # Ok::<(), tower_idempotency::errors::InvalidConsumer>(())
    /// ```
    #[must_use]
    pub fn shared(scope: Consumer) -> Self {
        Self::from_fn(move |_| Some(scope.clone()))
    }

    pub(crate) fn extract(&self, parts: &Parts) -> Option<Consumer> {
        (self.extract)(parts)
    }

    /// The header that names the consumer; `None` if the consumer comes from elsewhere.
    pub(crate) fn header_name(&self) -> Option<&HeaderName> {
        self.header.as_ref()
    }
}

impl Default for ConsumerExtractor {
    fn default() -> Self {
        let warned = AtomicBool::new(false);
        Self::from_fn(move |parts| {
            parts.extensions.get::<Consumer>().cloned().or_else(|| from_credentials(&parts.headers, &warned))
        })
    }
}

impl fmt::Debug for ConsumerExtractor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsumerExtractor")
    }
}

fn from_credentials(headers: &HeaderMap, warned: &AtomicBool) -> Option<Consumer> {
    let other_credential = OTHER_CREDENTIALS.iter().any(|name| headers.contains_key(*name));
    if !headers.contains_key(header::AUTHORIZATION) {
        return (!other_credential).then(|| Consumer("anonymous".into()));
    }
    // A cookie beside `Authorization` is common; an API key beside it may be the credential that counts.
    let ambiguous = OTHER_CREDENTIALS.iter().any(|name| *name != "cookie" && headers.contains_key(*name));
    let value = only_value(headers, &header::AUTHORIZATION)?;
    if ambiguous || !has_stable_scheme(value) {
        return None;
    }
    if looks_like_jwt(value.as_bytes()) && !warned.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            target: TRACING_TARGET,
            "the consumer is taken from a JWT, and a refreshed token counts as another consumer: its retries \
             run again; use ConsumerExtractor::extension()"
        );
    }
    Some(Consumer(format!("authorization:{}", hex(&Sha256::digest(value.as_bytes()))).into()))
}

fn only_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

fn has_stable_scheme(value: &HeaderValue) -> bool {
    let scheme = value.as_bytes().split(|byte| *byte == b' ').next().unwrap_or_default();
    scheme.eq_ignore_ascii_case(b"basic") || scheme.eq_ignore_ascii_case(b"bearer")
}

fn looks_like_jwt(value: &[u8]) -> bool {
    value.get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"bearer eyj"))
        && value.iter().filter(|byte| **byte == b'.').count() == 2
}

/// Headers that carry a credential in common APIs, other than `Authorization`.
pub(crate) const OTHER_CREDENTIALS: [&str; 6] =
    ["cookie", "x-api-key", "api-key", "apikey", "x-auth-token", "x-access-token"];

#[cfg(test)]
mod tests {
    use super::*;

    fn default_consumer(headers: &[(&'static str, &str)]) -> Option<Consumer> {
        let mut request = http::Request::new(());
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_str(value).unwrap());
        }
        ConsumerExtractor::default().extract(&request.into_parts().0)
    }

    #[test]
    fn names_are_checked_when_made() {
        assert!(Consumer::new("a").is_ok() && Consumer::new("ä".repeat(127)).is_ok());
        assert!(
            Consumer::new("").is_err()
                && Consumer::new("a\0").is_err()
                && Consumer::new("a".repeat(256)).is_err()
        );
    }

    #[test]
    fn credentials_tell_consumers_apart_and_are_not_kept() {
        let alice = default_consumer(&[("authorization", "Bearer alice-token")]).unwrap();
        let bob = default_consumer(&[("authorization", "Bearer bob-token")]).unwrap();
        assert_ne!(alice, bob);
        assert!(!alice.as_str().contains("alice"));
        assert!(default_consumer(&[("authorization", "basic Zm9vOmJhcg==")]).is_some());
    }

    #[test]
    fn no_credential_is_the_anonymous_scope() {
        assert_eq!(default_consumer(&[("accept", "*/*")]).unwrap().as_str(), "anonymous");
    }

    #[test]
    fn guesses_are_refused() {
        let refused: [&[(&str, &str)]; 6] = [
            &[("authorization", "Digest username=x")],
            &[("authorization", "AWS4-HMAC-SHA256 Credential=x")],
            &[("authorization", "Bearer a"), ("x-api-key", "b")],
            &[("authorization", "Bearer a"), ("authorization", "Bearer b")],
            &[("cookie", "session=1")],
            &[("x-api-key", "b")],
        ];
        for headers in refused {
            assert_eq!(default_consumer(headers), None, "{headers:?}");
        }
    }

    #[test]
    fn a_consumer_in_the_extensions_wins() {
        let (mut parts, ()) =
            http::Request::builder().header("x-api-key", "k").body(()).unwrap().into_parts();
        parts.extensions.insert(Consumer::new("acme").unwrap());
        assert_eq!(ConsumerExtractor::default().extract(&parts).unwrap().as_str(), "acme");
        assert_eq!(ConsumerExtractor::extension().extract(&parts).unwrap().as_str(), "acme");
    }

    #[test]
    fn a_repeated_or_non_utf8_header_identifies_nobody() {
        let extractor = ConsumerExtractor::header(HeaderName::from_static("x-account"));
        let mut request = http::Request::new(());
        assert_eq!(extractor.extract(&request.clone().into_parts().0), None);
        request.headers_mut().append("x-account", HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(extractor.extract(&request.clone().into_parts().0), None);
        request.headers_mut().insert("x-account", HeaderValue::from_static("acme"));
        assert_eq!(extractor.extract(&request.clone().into_parts().0).unwrap().as_str(), "acme");
        request.headers_mut().append("x-account", HeaderValue::from_static("acme"));
        assert_eq!(extractor.extract(&request.into_parts().0), None);
    }
}
