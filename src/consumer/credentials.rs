//! Which parts of a request count as credentials.

use http::{HeaderName, HeaderValue, Uri, header, request::Parts};
use sha2::{Digest, Sha256};

use crate::{head::original_uri, key::hex};

/// A header whose name says that it holds a credential.
pub(crate) fn is_credential(name: &HeaderName) -> bool {
    CREDENTIAL_WORDS.are_in(name.as_str()) && !is_harmless(name.as_str())
}

/// A header that says who sends the request: a credential, or a name that a proxy has put there.
pub(super) fn identifies(name: &HeaderName) -> bool {
    is_credential(name) || IDENTITY_WORDS.are_in(name.as_str()) && !is_harmless(name.as_str())
}

/// A header whose value is a credential itself, and not the name of its owner.
pub(super) fn is_secret(name: &HeaderName) -> bool {
    SECRET_WORDS.are_in(name.as_str()) && is_credential(name)
}

/// The digest of the value of a header.
pub(super) fn digest(name: &HeaderName, value: &str) -> String {
    hex(&Sha256::digest([name.as_str(), " ", value].concat()))
}

/// Headers of browsers, of the protocol and against forged forms, which say nothing about the
/// sender.
fn is_harmless(name: &str) -> bool {
    name.starts_with("sec-") || HARMLESS_WORDS.are_in(name)
}

/// A credential in the URI: a name with a password, or a parameter of the query.
pub(super) fn is_in_uri(parts: &Parts) -> bool {
    let uri = original_uri(parts);
    has_userinfo(uri) || uri.query().is_some_and(|query| query.split('&').any(is_credential_parameter))
}

fn has_userinfo(uri: &Uri) -> bool {
    uri.authority().is_some_and(|authority| authority.as_str().contains('@'))
}

fn is_credential_parameter(parameter: &str) -> bool {
    let name = parameter.split('=').next().unwrap_or_default();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    CREDENTIAL_PARAMETERS.contains(&name.to_ascii_lowercase().as_str())
}

/// The value of `Authorization`, as far as it can name a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Authorization<'a> {
    /// `Basic`, or `Bearer` with a token that says nothing about itself: an API key, perhaps.
    Opaque(Credential<'a>),
    /// `Bearer` with a token of a kind that is made to be refreshed.
    Refreshed(Credential<'a>),
    /// Another scheme, or none.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Credential<'a> {
    scheme: &'static str,
    value: &'a [u8],
}

impl<'a> Authorization<'a> {
    pub(super) fn parse(line: &'a HeaderValue) -> Self {
        let line = line.as_bytes();
        let blank = line.iter().position(|byte| *byte == b' ').unwrap_or(line.len());
        let (scheme, value) = line.split_at(blank);
        let value = value.trim_ascii();
        // With a comma or a blank it is a list of parameters, or two lines that a proxy has joined.
        if value.is_empty() || value.iter().any(|byte| matches!(byte, b',' | b' ' | b'\t')) {
            return Self::Other;
        }
        if scheme.eq_ignore_ascii_case(b"basic") {
            Self::Opaque(Credential { scheme: "basic", value })
        } else if !scheme.eq_ignore_ascii_case(b"bearer") {
            Self::Other
        } else if is_structured(value) {
            Self::Refreshed(Credential { scheme: "bearer", value })
        } else {
            Self::Opaque(Credential { scheme: "bearer", value })
        }
    }
}

impl Credential<'_> {
    /// The same for every spelling of the scheme.
    pub(super) fn digest(&self) -> String {
        hex(&Sha256::digest([self.scheme.as_bytes(), b" ", self.value].concat()))
    }
}

/// A JWT, JWE, SD-JWT, PASETO, macaroon, or base64 of JSON.
fn is_structured(token: &[u8]) -> bool {
    let token = token.split(|byte| *byte == b'~').next().unwrap_or_default();
    let parts: Vec<&[u8]> = token.split(|byte| *byte == b'.').collect();
    let is_jose = matches!(parts.len(), 3 | 5) && parts.iter().all(|part| part.iter().all(is_base64url));
    let is_paseto = matches!(parts[..], [version, purpose, ..]
        if version.first() == Some(&b'v') && [&b"local"[..], b"public"].contains(&purpose));
    // Base64 of the length of a macaroon's first packet and of "location".
    let is_macaroon = token.starts_with(b"MDA") && token.get(8..16) == Some(b"Y2F0aW9u");
    is_jose || is_paseto || is_macaroon || token.starts_with(b"eyJ")
}

fn is_base64url(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'=')
}

/// The names in a value of `Cookie`. A cookie without a name has an empty one.
pub(super) fn cookie_names(line: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    let cookies = line.as_bytes().split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
    cookies.filter(|cookie| !cookie.is_empty()).map(|cookie| {
        let end = cookie.iter().position(|byte| *byte == b'=').unwrap_or(0);
        cookie[..end].trim_ascii()
    })
}

/// Words of two ASCII letters and more, and the pairs of letters with which they begin: most names
/// of headers have none of those, and are not compared with each word.
struct Words<const N: usize> {
    words: [&'static str; N],
    beginnings: [u32; 32],
}

impl<const N: usize> Words<N> {
    const fn new(words: [&'static str; N]) -> Self {
        let mut beginnings = [0; 32];
        let mut at = 0;
        while at < N {
            let word = words[at].as_bytes();
            beginnings[(word[0] & 31) as usize] |= 1 << (word[1] & 31);
            at += 1;
        }
        Self { words, beginnings }
    }

    fn are_in(&self, name: &str) -> bool {
        let name = name.as_bytes();
        name.windows(2).enumerate().any(|(at, pair)| {
            let seconds = self.beginnings[usize::from(pair[0] & 31)];
            seconds >> (pair[1] & 31) & 1 == 1
                && self.words.iter().any(|word| name[at..].starts_with(word.as_bytes()))
        })
    }
}

/// Credentials that are read by their values.
pub(super) const READ_BY_VALUE: [HeaderName; 2] = [header::AUTHORIZATION, header::COOKIE];

const CREDENTIAL_WORDS: Words<18> = Words::new([
    "auth",
    "token",
    "key",
    "secret",
    "session",
    "signature",
    "credential",
    "password",
    "passwd",
    "cookie",
    "jwt",
    "assertion",
    "cert",
    "oidc",
    "dpop",
    "hmac",
    "saml",
    "wsse",
]);

const SECRET_WORDS: Words<10> = Words::new([
    "authorization",
    "token",
    "key",
    "secret",
    "session",
    "password",
    "passwd",
    "cookie",
    "jwt",
    "assertion",
]);

const IDENTITY_WORDS: Words<17> = Words::new([
    "user",
    "account",
    "merchant",
    "customer",
    "consumer",
    "partner",
    "member",
    "principal",
    "subject",
    "identity",
    "client-id",
    "client-dn",
    "ssl-client",
    "tls-client",
    "spiffe",
    "email",
    "login",
]);

/// Against forged forms and robots; of App Engine; asks for a signed answer; the key of this layer
/// or of another one.
const HARMLESS_WORDS: Words<10> = Words::new([
    "csrf",
    "xsrf",
    "antiforgery",
    "anti-forgery",
    "requestverification",
    "captcha",
    "user-agent",
    "user-ip",
    "accept-signature",
    "idempotency",
]);

/// Without what stands between their words.
const CREDENTIAL_PARAMETERS: [&str; 22] = [
    "accesskey",
    "accesstoken",
    "apikey",
    "apitoken",
    "auth",
    "authkey",
    "authorization",
    "authtoken",
    "clientsecret",
    "idtoken",
    "jwt",
    "password",
    "secret",
    "session",
    "sessionid",
    "sessiontoken",
    "sig",
    "signature",
    "token",
    "xamzsecuritytoken",
    "xamzsignature",
    "xgoogsignature",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn authorization(value: &str) -> &'static str {
        match Authorization::parse(&HeaderValue::from_str(value).unwrap()) {
            Authorization::Opaque(_) => "opaque",
            Authorization::Refreshed(_) => "refreshed",
            Authorization::Other => "other",
        }
    }

    #[test]
    fn headers_that_say_who_sends_a_request_are_told_by_their_names() {
        let who = [
            "x-api-key",
            "api-key",
            "apikey",
            "x-auth-token",
            "x-access-token",
            "x-merchant-token",
            "x-amz-security-token",
            "x-goog-iap-jwt-assertion",
            "x-goog-authenticated-user-email",
            "x-forwarded-user",
            "x-remote-user",
            "x-forwarded-client-cert",
            "client-cert",
            "signature",
            "x-hub-signature-256",
            "proxy-authorization",
            "x-amzn-oidc-data",
            "x-ms-client-principal",
            "x-session-id",
            "x-account-id",
            "x-client-id",
            "x-consumer-id",
            "x-forwarded-email",
            "x-ssl-client-s-dn",
            "ssl-client-subject-dn",
            "x-client-dn",
            "x-spiffe-id",
            "x-wsse",
            "x-shopify-hmac-sha256",
            "dpop",
            "ocp-apim-subscription-key",
        ];
        for name in who {
            assert!(identifies(&HeaderName::from_static(name)), "{name}");
        }
        let not = [
            "accept",
            "accept-language",
            "baggage",
            "cf-connecting-ip",
            "content-type",
            "expect",
            "forwarded",
            "grpc-timeout",
            "host",
            "if-match",
            "keep-alive",
            "origin",
            "priority",
            "sec-ch-ua",
            "sec-fetch-user",
            "sec-websocket-key",
            "sentry-trace",
            "te",
            "traceparent",
            "tracestate",
            "user-agent",
            "x-b3-traceid",
            "x-correlation-id",
            "idempotency-key",
            "x-idempotency-key",
            "requestverificationtoken",
            "x-anti-forgery-token",
            "x-recaptcha-token",
            "x-appengine-user-ip",
            "accept-signature",
            "x-csrf-token",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-request-id",
            "x-requested-with",
            "x-tenant",
            "x-user-agent",
            "x-xsrf-token",
        ];
        for name in not {
            assert!(!identifies(&HeaderName::from_static(name)), "{name}");
        }
    }

    #[test]
    fn words_are_found_wherever_they_stand() {
        for word in CREDENTIAL_WORDS.words {
            for name in [word.to_owned(), format!("x-{word}"), format!("{word}-x"), format!("xx{word}xx")] {
                assert!(CREDENTIAL_WORDS.are_in(&name), "{name}");
            }
            assert!(!CREDENTIAL_WORDS.are_in(&format!("x{}", &word[..word.len() - 1])), "{word}");
        }
        assert!(!CREDENTIAL_WORDS.are_in("") && !CREDENTIAL_WORDS.are_in("a"));
    }

    #[test]
    fn tokens_that_are_made_to_be_refreshed_are_told_by_their_form() {
        for token in [
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln",
            "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.",
            "eyJhbGciOiJkaXIifQ..aXY.Y3Q.dGFn",
            "IHsiYWxnIjoiSFMyNTYifQ.e30.c2ln",
            "eyJhbGciOiJFUzI1NiJ9.e30.c2ln~WyJhIl0~",
            "v4.local.AAAA",
            "v4.public.AAAA.Zm9vdGVy",
            "MDAxY2xvY2F0aW9uIGh0dHA6Ly9hCg",
            "eyJpZCI6MX0=",
        ] {
            for line in [format!("Bearer {token}"), format!("bearer   {token}"), format!("BEARER {token} ")] {
                assert_eq!(authorization(&line), "refreshed", "{line}");
            }
        }
        for token in ["sk_live_4eC39Hq", "t1", "a.b", "ghp_16C7e42F292c", "a/b+c==", "a.b.c.d", "a.b.c/d"] {
            assert_eq!(authorization(&format!("Bearer {token}")), "opaque", "{token}");
        }
        assert_eq!(authorization("basic Zm9vOmJhcg=="), "opaque");
    }

    #[test]
    fn other_schemes_and_joined_lines_name_no_consumer() {
        for line in [
            "",
            "Bearer",
            "Bearer ",
            "t1",
            "Digest username=\"x\"",
            "AWS4-HMAC-SHA256 Credential=x",
            "Negotiate YII=",
            "DPoP t1",
            "Bearer a, Bearer b",
            "Basic YTpi,Basic Yzpk",
            "Bearer a b",
            "Bearer\ta",
        ] {
            assert_eq!(authorization(line), "other", "{line}");
        }
    }

    #[test]
    fn credentials_in_the_uri_are_found() {
        let found =
            |uri: &str| is_in_uri(&http::Request::builder().uri(uri).body(()).unwrap().into_parts().0);
        for uri in ["/?api_key=1", "/?a=1&access-token=2", "/?Token", "/?X-Amz-Signature=1", "http://u:p@a/"]
        {
            assert!(found(uri), "{uri}");
        }
        for uri in ["/", "/?key=1", "/?page_token=1", "/token?a=token", "http://a/?user=1"] {
            assert!(!found(uri), "{uri}");
        }
    }

    #[test]
    fn cookies_are_named() {
        let names = |line: &'static str| {
            let line = HeaderValue::from_static(line);
            cookie_names(&line).map(|name| String::from_utf8(name.to_vec()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names("AWSALB=a=b; c = 1;;nameless"), ["AWSALB", "c", ""]);
    }
}
