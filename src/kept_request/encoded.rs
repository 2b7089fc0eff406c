//! Kept requests as bytes.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header, request::Parts};

use crate::{
    encoding::{Unsealed, get_bytes, get_headers, put_bytes, put_headers, seal, unseal},
    fingerprint::original_uri,
    settings::Settings,
};

/// Kept bytes that are no request. They are never sent.
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

pub(super) fn encode(settings: &Settings, parts: &Parts, body: &Bytes) -> Bytes {
    let uri = original_uri(parts);
    let target = uri.path_and_query().map_or_else(|| uri.path(), |target| target.as_str());
    let mut payload = Vec::new();
    put_bytes(&mut payload, parts.method.as_str().as_bytes());
    // In absolute form a query may follow the authority at once.
    let target = if target.starts_with('?') { format!("/{target}") } else { target.to_owned() };
    put_bytes(&mut payload, target.as_bytes());
    put_headers(&mut payload, &kept_headers(settings, parts, uri));
    put_bytes(&mut payload, body);
    seal(VERSION, &payload)
}

pub(super) fn decode(encoded: &Bytes) -> Result<Request<Bytes>, UnreadableRequest> {
    let mut input = unseal(VERSION, encoded)?;
    decode_payload(&mut input).ok_or(UnreadableRequest::Damaged)
}

fn decode_payload(input: &mut Bytes) -> Option<Request<Bytes>> {
    let method = Method::from_bytes(&get_bytes(input)?).ok()?;
    let uri = Uri::from_maybe_shared(get_bytes(input)?).ok()?;
    let headers = get_headers(input)?;
    let mut request = Request::new(get_bytes(input)?);
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    input.is_empty().then_some(request)
}

fn kept_headers(settings: &Settings, parts: &Parts, uri: &Uri) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in settings.names_of_kept_headers() {
        if kept.contains_key(name) || settings.is_credential(name) {
            continue;
        }
        for value in parts.headers.get_all(name).iter().filter(|value| !value.is_sensitive()) {
            kept.append(name.clone(), value.clone());
        }
        if name == header::HOST && !kept.contains_key(name) {
            kept.extend(host_of(uri).map(|host| (header::HOST, host)));
        }
    }
    kept
}

fn host_of(uri: &Uri) -> Option<HeaderValue> {
    let host = uri.host()?;
    let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
    HeaderValue::from_str(&format!("{host}{port}")).ok()
}

impl Settings {
    fn names_of_kept_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let always = [&header::CONTENT_TYPE, &header::CONTENT_ENCODING, &self.key_header];
        let chosen = self.kept_requests.iter().flat_map(|kept| &kept.headers);
        always.into_iter().chain(self.fingerprinter.headers()).chain(chosen)
    }
}

const VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ConsumerExtractor, Fingerprinter, KeptRequests};

    fn settings() -> Settings {
        let kept = KeptRequests::new().add_header(header::HOST).add_header(header::ACCEPT);
        Settings {
            kept_requests: Some(kept),
            fingerprinter: Fingerprinter::default().add_header(HeaderName::from_static("x-tenant")),
            ..Settings::default()
        }
    }

    fn parts(uri: &str, headers: &[(&str, &[u8])]) -> Parts {
        let mut builder = Request::builder().method(Method::PATCH).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, HeaderValue::from_bytes(value).unwrap());
        }
        builder.body(()).unwrap().into_parts().0
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_kept(
            body in proptest::collection::vec(any::<u8>(), 0..512),
            tenants in proptest::collection::vec(proptest::collection::vec(0x80..=0xffu8, 0..9), 0..4),
        ) {
            let mut headers: Vec<(&str, &[u8])> = vec![("content-type", b"a/b"), ("idempotency-key", b"k")];
            headers.extend(tenants.iter().map(|value| ("x-tenant", &value[..])));
            let parts = parts("/a/%20b?c=d&e", &headers);
            let decoded = decode(&encode(&settings(), &parts, &body.clone().into())).unwrap();
            prop_assert_eq!(decoded.method(), Method::PATCH);
            prop_assert_eq!(decoded.uri(), "/a/%20b?c=d&e");
            prop_assert_eq!(decoded.headers(), &parts.headers);
            prop_assert_eq!(&decoded.body()[..], &body[..]);
        }

        #[test]
        fn a_changed_byte_or_a_cut_is_noticed(at in 0usize..64, cut in 0usize..64) {
            let encoded = encode(&settings(), &parts("/", &[]), &vec![7; 64].into());
            let mut changed = encoded.to_vec();
            changed[at] ^= 0x55;
            prop_assert!(decode(&changed.into()).is_err());
            prop_assert!(decode(&encoded.slice(..cut)).is_err());
        }
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut encoded = encode(&settings(), &parts("/", &[]), &Bytes::new()).to_vec();
        encoded[0] = 9;
        assert_eq!(decode(&encoded.into()).unwrap_err(), UnreadableRequest::Version(9));
    }

    #[test]
    fn credentials_and_what_was_not_chosen_are_not_kept() {
        let mut settings = settings();
        settings.consumer = ConsumerExtractor::header(header::ACCEPT);
        let headers: [(&str, &[u8]); 5] = [
            ("authorization", b"Bearer secret"),
            ("cookie", b"secret"),
            ("x-other", b"1"),
            ("accept", b"acme"),
            ("x-tenant", b"t"),
        ];
        let mut parts = parts("http://user:secret@pay.example:81/a?b", &headers);
        let mut sensitive = HeaderValue::from_static("secret");
        sensitive.set_sensitive(true);
        parts.headers.append("x-tenant", sensitive);
        let encoded = encode(&settings, &parts, &Bytes::new());
        assert!(!encoded.windows(6).any(|window| window == b"secret"));
        let decoded = decode(&encoded).unwrap();
        assert_eq!(decoded.uri(), "/a?b");
        let line =
            |(name, value): (&HeaderName, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap());
        let kept: Vec<_> = decoded.headers().iter().map(line).collect();
        assert_eq!(kept, ["x-tenant: t", "host: pay.example:81"]);
    }
}
