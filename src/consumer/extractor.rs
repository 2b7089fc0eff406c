//! How a request names its consumer.

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue, header, request::Parts};

use super::{
    Consumer,
    credentials::{Authorization, READ_BY_VALUE, cookie_names, digest, identifies, is_in_uri, is_secret},
    unidentified::{Unidentified, warn_of_anonymous, warn_of_digest},
};
use crate::head::{lines_of, only_line_of};

type Find = dyn Fn(&Parts) -> Option<Consumer> + Send + Sync;

/// Finds the consumer of a request.
///
/// A request whose consumer is not found is refused with 403 `consumer-unidentified`, and the cause
/// is logged once in the life of the process. The default looks in this order:
///
/// 1. The [`Consumer`] that an authentication layer has put into the request's extensions.
/// 2. A digest of the `Authorization` header, if it holds `Basic` credentials or an opaque `Bearer`
///    token, such as an API key. A WARN says once that a token that is refreshed becomes another
///    consumer: its retries run again.
/// 3. The [anonymous scope](Consumer::anonymous), if the request carries no credential. All such
///    requests share it, which a WARN says once.
///
/// Every other request is refused, because a guess would either show one user's response to another
/// or protect no request. These are refused:
///
/// * a `Bearer` token that is made to be refreshed: a JWT, JWE, PASETO or macaroon
/// * another scheme, because its value may change with each request
/// * more than one `Authorization` line
/// * another header that says who sends the request, alone or beside `Authorization`: every header
///   whose name contains `auth`, `token`, `key`, `secret`, `session`, `signature`, `credential`,
///   `password`, `passwd`, `cookie`, `jwt`, `assertion`, `cert`, `oidc`, `dpop`, `hmac`, `saml`,
///   `wsse`, `user`, `account`, `merchant`, `customer`, `consumer`, `partner`, `member`,
///   `principal`, `subject`, `identity`, `client-id`, `client-dn`, `ssl-client`, `tls-client`,
///   `spiffe`, `email` or `login`, but for the header of the key, names with `idempotency`,
///   `User-Agent`, `Sec-*`, `Accept-Signature`, `user-ip`, and tokens against forged requests and
///   robots (`csrf`, `xsrf`, `antiforgery`, `anti-forgery`, `requestverification`, `captcha`)
/// * a `Cookie` without `Authorization`
/// * a credential in the URI: a user name, or a query parameter such as `api_key` or `access_token`
///
/// Name those that are no credentials with [`add_ignored_header`](Self::add_ignored_header) and
/// [`add_ignored_cookie`](Self::add_ignored_cookie). A header under any other name is not
/// recognized, and a client certificate cannot be seen: their requests are anonymous. Put a
/// [`Consumer`] into the extensions there.
///
/// Credentials are never stored, only their digest. The digest has no salt: a person who reads the
/// table or the log can test guesses of a weak `Basic` password.
///
/// ```
/// # use tower_idempotency::{ConsumerExtractor, IdempotencyLayer, MemoryStore};
/// let layer = IdempotencyLayer::new(MemoryStore::new())
///     .with_consumer(ConsumerExtractor::extension());
/// ```
#[derive(Clone)]
pub struct ConsumerExtractor {
    source: Source,
    ignored_headers: Vec<HeaderName>,
    ignored_cookies: Vec<String>,
}

#[derive(Clone)]
enum Source {
    ExtensionOrCredentials,
    AuthorizationDigest,
    Extension,
    Header(HeaderName),
    Closure(Arc<Find>),
    Shared(Consumer),
}

impl ConsumerExtractor {
    /// Takes the [`Consumer`] from the request's extensions. Recommended.
    ///
    /// An authentication layer puts it there; that layer must be outside this one, so that it runs
    /// first.
    #[must_use]
    pub fn extension() -> Self {
        Self::of(Source::Extension)
    }

    /// Takes a digest of the `Authorization` header: of `Basic`, or of any `Bearer` token, also of
    /// one that looks like a JWT.
    ///
    /// Choose it only if clients use one token for as long as they may retry: **a retry with a
    /// refreshed token runs again**. It logs no warning. Every request that the
    /// [default](Self::default) refuses for another reason is refused, and one without
    /// `Authorization` too.
    ///
    /// ```
    /// # use tower_idempotency::ConsumerExtractor;
    /// let extractor = ConsumerExtractor::authorization_digest();
    /// ```
    #[must_use]
    pub fn authorization_digest() -> Self {
        Self::of(Source::AuthorizationDigest)
    }

    /// Takes the value of a header, which a trusted proxy must set: a client that can set it can
    /// name any consumer.
    ///
    /// A request is refused if it has no such header, two of them, or a value that is no
    /// [`Consumer`]. `Host` is taken from the URI where HTTP/2 has it.
    ///
    /// A header whose name contains `authorization`, `token`, `key`, `secret`, `session`,
    /// `password`, `passwd`, `cookie`, `jwt` or `assertion` holds a credential: the consumer is a
    /// digest of its value, so that the credential itself is neither stored nor logged.
    ///
    /// ```
    /// # use tower_idempotency::ConsumerExtractor;
    /// let extractor = ConsumerExtractor::header(http::HeaderName::from_static("x-account"));
    /// ```
    #[must_use]
    pub fn header(name: HeaderName) -> Self {
        Self::of(Source::Header(name))
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
        Self::of(Source::Closure(Arc::new(extract)))
    }

    /// Puts all requests into one scope. Use it only if the API has a single consumer.
    ///
    /// Two clients that send an equal key and an equal request get the same response. It logs no
    /// warning.
    ///
    /// ```
    /// # use tower_idempotency::{Consumer, ConsumerExtractor};
    /// let extractor = ConsumerExtractor::shared(Consumer::anonymous());
    /// ```
    #[must_use]
    pub fn shared(scope: Consumer) -> Self {
        Self::of(Source::Shared(scope))
    }

    /// Names a header that is no credential, though its name looks like one: the
    /// [default](Self::default) and [`authorization_digest`](Self::authorization_digest) do not
    /// refuse requests for it, and it may be [kept](crate::recovery::KeptRequests).
    ///
    /// ```
    /// # use tower_idempotency::ConsumerExtractor;
    /// let extractor = ConsumerExtractor::default()
    ///     .add_ignored_header(http::HeaderName::from_static("x-author"));
    /// ```
    #[must_use]
    pub fn add_ignored_header(mut self, name: HeaderName) -> Self {
        self.ignored_headers.push(name);
        self
    }

    /// Names a cookie that is no credential, such as a load balancer's: the
    /// [default](Self::default) does not refuse requests whose cookies are all named here. Case
    /// counts.
    ///
    /// ```
    /// # use tower_idempotency::ConsumerExtractor;
    /// let extractor = ConsumerExtractor::default()
    ///     .add_ignored_cookie("AWSALB")
    ///     .add_ignored_cookie("AWSALBCORS");
    /// ```
    #[must_use]
    pub fn add_ignored_cookie(mut self, name: impl Into<String>) -> Self {
        self.ignored_cookies.push(name.into());
        self
    }

    fn of(source: Source) -> Self {
        Self { source, ignored_headers: Vec::new(), ignored_cookies: Vec::new() }
    }

    /// `key_header` carries the key, and no credential whatever its name.
    pub(crate) fn extract(&self, parts: &Parts, key_header: &HeaderName) -> Result<Consumer, Unidentified> {
        match &self.source {
            Source::ExtensionOrCredentials => match parts.extensions.get::<Consumer>() {
                Some(consumer) => Ok(consumer.clone()),
                None => self.guess(parts, key_header),
            },
            Source::AuthorizationDigest => {
                self.refuse_other_credentials(parts, key_header)?;
                digest_of_authorization(parts, true)?.ok_or(Unidentified::NoAuthorization)
            }
            Source::Extension => parts.extensions.get::<Consumer>().cloned().ok_or(Unidentified::NoExtension),
            Source::Header(name) => named_by(parts, name).ok_or_else(|| Unidentified::NoHeader(name.clone())),
            Source::Closure(find) => find(parts).ok_or(Unidentified::NoneFound),
            Source::Shared(scope) => Ok(scope.clone()),
        }
    }

    fn guess(&self, parts: &Parts, key_header: &HeaderName) -> Result<Consumer, Unidentified> {
        self.refuse_other_credentials(parts, key_header)?;
        if let Some(consumer) = digest_of_authorization(parts, false)? {
            warn_of_digest();
            return Ok(consumer);
        }
        // Beside `Authorization` a cookie is common, and not the credential that counts.
        if lines_of(parts, &header::COOKIE).iter().any(|line| self.has_session(line)) {
            return Err(Unidentified::Cookie);
        }
        warn_of_anonymous();
        Ok(Consumer::anonymous())
    }

    fn refuse_other_credentials(&self, parts: &Parts, key_header: &HeaderName) -> Result<(), Unidentified> {
        let is_other = |name: &&HeaderName| {
            *name != key_header && !READ_BY_VALUE.contains(name) && !self.ignores(name) && identifies(name)
        };
        match parts.headers.keys().find(is_other) {
            Some(name) => Err(Unidentified::OtherCredential(name.clone())),
            None if is_in_uri(parts) => Err(Unidentified::CredentialInUri),
            None => Ok(()),
        }
    }

    fn has_session(&self, cookies: &HeaderValue) -> bool {
        let is_ignored = |name: &[u8]| self.ignored_cookies.iter().any(|cookie| cookie.as_bytes() == name);
        !cookie_names(cookies).all(is_ignored)
    }

    /// A header that an operator has named as no credential.
    pub(crate) fn ignores(&self, name: &HeaderName) -> bool {
        self.ignored_headers.contains(name)
    }

    /// The header that names the consumer; `None` if the consumer comes from elsewhere.
    pub(crate) fn header_name(&self) -> Option<&HeaderName> {
        match &self.source {
            Source::Header(name) => Some(name),
            Source::ExtensionOrCredentials
            | Source::AuthorizationDigest
            | Source::Extension
            | Source::Closure(_)
            | Source::Shared(_) => None,
        }
    }
}

impl Default for ConsumerExtractor {
    fn default() -> Self {
        Self::of(Source::ExtensionOrCredentials)
    }
}

impl fmt::Debug for ConsumerExtractor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerExtractor")
            .field("ignored_headers", &self.ignored_headers)
            .field("ignored_cookies", &self.ignored_cookies)
            .finish_non_exhaustive()
    }
}

fn named_by(parts: &Parts, name: &HeaderName) -> Option<Consumer> {
    let line = only_line_of(parts, name)?;
    let value = std::str::from_utf8(line.as_bytes()).ok()?;
    let consumer = Consumer::new(value).ok()?;
    Some(if is_secret(name) {
        Consumer::reserved(&format!("header:{}", digest(name, value)))
    } else {
        consumer
    })
}

/// `None` if the request has no `Authorization`.
fn digest_of_authorization(parts: &Parts, may_be_refreshed: bool) -> Result<Option<Consumer>, Unidentified> {
    let lines = lines_of(parts, &header::AUTHORIZATION);
    let credential = match lines.as_slice() {
        [] => return Ok(None),
        [line] => match Authorization::parse(line) {
            Authorization::Opaque(credential) => credential,
            Authorization::Refreshed(credential) if may_be_refreshed => credential,
            Authorization::Refreshed(_) => return Err(Unidentified::Refreshed),
            Authorization::Other => return Err(Unidentified::OtherScheme),
        },
        _ => return Err(Unidentified::SeveralAuthorizations),
    };
    Ok(Some(Consumer::reserved(&format!("authorization:{}", credential.digest()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Headers<'a> = &'a [(&'static str, &'a str)];

    fn parts(headers: Headers<'_>) -> Parts {
        let mut request = http::Request::new(());
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_str(value).unwrap());
        }
        request.into_parts().0
    }

    fn extract(extractor: &ConsumerExtractor, headers: Headers<'_>) -> Result<Consumer, Unidentified> {
        extractor.extract(&parts(headers), &HeaderName::from_static("idempotency-key"))
    }

    fn default_consumer(headers: Headers<'_>) -> Result<Consumer, Unidentified> {
        extract(&ConsumerExtractor::default(), headers)
    }

    #[test]
    fn scopes_of_the_crate_are_reserved_and_readable() {
        let digest = default_consumer(&[("authorization", "Bearer t1")]).unwrap();
        for scope in [Consumer::anonymous(), digest] {
            assert!(
                Consumer::new(scope.as_str()).is_err() && Consumer::new(scope.to_string()).unwrap() != scope
            );
            assert_eq!(Consumer::from_stored(scope.as_str()).unwrap(), scope);
            assert!(!scope.to_string().contains('\u{1f}') && scope.as_str().len() <= 255);
        }
    }

    #[test]
    fn credentials_tell_consumers_apart_and_are_not_kept() {
        let alice = default_consumer(&[("authorization", "Bearer alice-token")]).unwrap();
        let bob = default_consumer(&[("authorization", "Bearer bob-token")]).unwrap();
        assert_ne!(alice, bob);
        assert!(!alice.as_str().contains("alice"));
        assert_eq!(default_consumer(&[("authorization", "bearer  alice-token ")]).unwrap(), alice);
        assert_ne!(default_consumer(&[("authorization", "basic alice-token")]).unwrap(), alice);
    }

    #[test]
    fn no_credential_is_the_anonymous_scope() {
        let headers: [Headers<'_>; 3] = [&[], &[("accept", "*/*"), ("x-csrf-token", "1")], &[("cookie", "")]];
        for headers in headers {
            assert_eq!(default_consumer(headers).unwrap(), Consumer::anonymous(), "{headers:?}");
        }
    }

    #[test]
    fn guesses_are_refused() {
        let jwt = "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln";
        let other = |name| Unidentified::OtherCredential(HeaderName::from_static(name));
        let refused: [(Headers<'_>, Unidentified); 9] = [
            (&[("authorization", "Digest username=x")], Unidentified::OtherScheme),
            (&[("authorization", "")], Unidentified::OtherScheme),
            (&[("authorization", jwt)], Unidentified::Refreshed),
            (&[("authorization", "Bearer a"), ("x-api-key", "b")], other("x-api-key")),
            (
                &[("authorization", "Bearer a"), ("authorization", "Bearer b")],
                Unidentified::SeveralAuthorizations,
            ),
            (&[("cookie", "session=1")], Unidentified::Cookie),
            (&[("x-api-key", "b")], other("x-api-key")),
            (&[("x-merchant-token", "m1")], other("x-merchant-token")),
            (&[("x-forwarded-user", "u")], other("x-forwarded-user")),
        ];
        for (headers, cause) in refused {
            assert_eq!(default_consumer(headers), Err(cause), "{headers:?}");
        }
    }

    #[test]
    fn a_digest_is_chosen_knowingly() {
        let digest = ConsumerExtractor::authorization_digest();
        let jwt: Headers<'_> = &[("authorization", "Bearer a.b.c")];
        assert_ne!(extract(&digest, jwt).unwrap(), Consumer::anonymous());
        let opaque: Headers<'_> = &[("authorization", "Bearer a"), ("cookie", "session=1")];
        assert_eq!(extract(&digest, opaque), default_consumer(opaque));
        assert_eq!(extract(&digest, &[]), Err(Unidentified::NoAuthorization));
        assert!(extract(&digest, &[("authorization", "Bearer a"), ("x-api-key", "b")]).is_err());
    }

    #[test]
    fn headers_and_cookies_that_are_no_credentials_can_be_named() {
        let extractor = ConsumerExtractor::default()
            .add_ignored_cookie("AWSALB")
            .add_ignored_header(HeaderName::from_static("x-author"));
        let anonymous: [Headers<'_>; 2] = [
            &[("cookie", "AWSALB=1"), ("cookie", "AWSALB=2;")],
            &[("x-author", "a"), ("cookie", "AWSALB=1")],
        ];
        for headers in anonymous {
            assert_eq!(extract(&extractor, headers), Ok(Consumer::anonymous()), "{headers:?}");
        }
        for cookies in ["AWSALB=1; session=2", "awsalb=1", "AWSALB", "AWSALB2=1"] {
            assert_eq!(extract(&extractor, &[("cookie", cookies)]), Err(Unidentified::Cookie), "{cookies}");
        }
    }

    #[test]
    fn the_header_of_the_key_is_no_credential() {
        let parts = parts(&[("x-request-token", "k")]);
        let of =
            |key_header| ConsumerExtractor::default().extract(&parts, &HeaderName::from_static(key_header));
        assert_eq!(of("x-request-token"), Ok(Consumer::anonymous()));
        assert!(of("idempotency-key").is_err());
    }

    #[test]
    fn a_consumer_in_the_extensions_wins() {
        let mut parts = parts(&[("x-api-key", "k")]);
        parts.extensions.insert(Consumer::new("acme").unwrap());
        for extractor in [ConsumerExtractor::default(), ConsumerExtractor::extension()] {
            let found = extractor.extract(&parts, &HeaderName::from_static("idempotency-key"));
            assert_eq!(found.unwrap().as_str(), "acme");
        }
    }

    #[test]
    fn a_repeated_or_non_utf8_header_identifies_nobody() {
        let name = HeaderName::from_static("x-account");
        let extractor = ConsumerExtractor::header(name.clone());
        let of = |values: &[&[u8]]| {
            let mut parts = parts(&[]);
            for value in values {
                parts.headers.append(name.clone(), HeaderValue::from_bytes(value).unwrap());
            }
            extractor.extract(&parts, &HeaderName::from_static("idempotency-key")).ok()
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[b"\xff"]), None);
        assert_eq!(of(&[b"acme"]).unwrap().as_str(), "acme");
        assert_eq!(of(&[b"acme "]), of(&[b"acme"]));
        assert_eq!(of(&[b"acme", b"acme"]), None);
    }
}
