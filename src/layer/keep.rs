//! Keeping requests before their handlers run.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, header, request::Parts};

use crate::{
    attempt::Won,
    consumer::is_credential,
    error::StoreError,
    head::{lines_of, original_uri},
    layer::{
        decision::{Guarded, KeySource},
        settings::Settings,
    },
    node::leases::usable,
    rejection::{Rejection, RejectionCode},
    stored::{codec::Codec, record::Fenced},
};

impl Settings {
    /// Panics if credentials would be kept.
    #[track_caller]
    pub(crate) fn check_kept_requests(&self) {
        let Some(kept) = &self.kept_requests else { return };
        if let Some(name) = kept.headers.iter().find(|name| self.is_credential(name)) {
            panic!(
                "{name} identifies who sends a request and cannot be kept with it: remove it from \
                 KeptRequests; what Restore puts back takes its place. If it is no credential, name it with \
                 ConsumerExtractor::add_ignored_header"
            );
        }
        if let Some(name) = self.fingerprinter.headers().find(|name| self.is_credential(name)) {
            panic!(
                "the fingerprint covers {name}, which identifies who sends a request and cannot be kept with \
                 it, so that a request that is sent again would never be the same: remove it from the \
                 Fingerprinter. If it is no credential, name it with \
                 ConsumerExtractor::add_ignored_header"
            );
        }
    }

    fn is_credential(&self, name: &HeaderName) -> bool {
        let by_name = is_credential(name) && *name != self.key_header && !self.consumer.ignores(name);
        by_name || self.consumer.header_name() == Some(name)
    }

    fn names_of_kept_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let always = [&header::CONTENT_TYPE, &header::CONTENT_ENCODING, &self.key_header];
        let chosen = self.kept_requests.iter().flat_map(|kept| &kept.headers);
        always.into_iter().chain(self.fingerprinter.headers()).chain(chosen)
    }
}

impl Guarded {
    /// Keeps the request of a claim that was won. A request that is sent again is kept already, and
    /// runs only for the record for which it was kept.
    pub(crate) async fn keep_request(&self, won: &Won, parts: &Parts, body: &Bytes) -> Result<(), Rejection> {
        if let KeySource::Resent(resent) = &self.key {
            return if resent.record_id == won.record_id { Ok(()) } else { Err(record_gone()) };
        }
        match self.keep_once(won, parts, body).await {
            Ok(Fenced::Applied) => Ok(()),
            Ok(Fenced::Lost) => Err(self.in_progress(&won.claim.attempt)),
            Err(error) => Err(self.store_failed(&won.claim.attempt, &error, "the request could not be kept")),
        }
    }

    /// The lease is not renewed yet: the request is kept in the time in which the attempt surely
    /// owns its record.
    async fn keep_once(&self, won: &Won, parts: &Parts, body: &Bytes) -> Result<Fenced, StoreError> {
        let Some(kept) = &self.settings.kept_requests else { return Ok(Fenced::Applied) };
        let recovery = self.node.recovery()?;
        let Won { claim, record_id, claimed_at, .. } = won;
        let (attempt, record_id) = (claim.attempt.clone(), *record_id);
        let request = encoded(&self.node.codec, &self.settings, parts, body);
        let after = claim.lease.saturating_add(kept.abandoned_after);
        let usable = usable(claim.lease).saturating_sub(claimed_at.elapsed());
        let limit = self.settings.attempts.store_timeout.min(usable);
        let keep = async move { recovery.keep_request(&attempt, record_id, &request, after).await };
        self.node.tasks.call(limit, keep).await
    }
}

fn record_gone() -> Rejection {
    Rejection::new(RejectionCode::KeyReused, "The record of the request that is sent again has gone.")
}

fn encoded(codec: &Codec, settings: &Settings, parts: &Parts, body: &Bytes) -> Bytes {
    let uri = original_uri(parts);
    let target = uri.path_and_query().map_or_else(|| uri.path(), |target| target.as_str());
    // In absolute form a query may follow the authority without a path.
    let target = if target.starts_with('?') { format!("/{target}") } else { target.to_owned() };
    codec.request(&parts.method, &target, &kept_headers(settings, parts), body)
}

fn kept_headers(settings: &Settings, parts: &Parts) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in settings.names_of_kept_headers() {
        if kept.contains_key(name) || settings.is_credential(name) {
            continue;
        }
        for value in lines_of(parts, name).into_iter().filter(|value| !value.is_sensitive()) {
            kept.append(name.clone(), value);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Method, Request};

    use super::*;
    use crate::{
        consumer::{Consumer, ConsumerExtractor},
        fingerprint::Fingerprinter,
        key::IdempotencyKey,
        layer::kept_requests::KeptRequests,
        stored::{record::RecordId, request::KeptRequest},
    };

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
        let encoded = encoded(&Codec, &settings, &parts, &Bytes::new());
        assert!(!encoded.windows(6).any(|window| window == b"secret"));
        let (consumer, key) = (Consumer::new("acme").unwrap(), IdempotencyKey::new("k").unwrap());
        let decoded = KeptRequest::new(RecordId::random(), consumer, key, encoded).decode().unwrap();
        assert_eq!(decoded.uri(), "/a?b");
        let line =
            |(name, value): (&HeaderName, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap());
        let kept: Vec<_> = decoded.headers().iter().map(line).collect();
        assert_eq!(kept, ["x-tenant: t", "host: pay.example:81"]);
    }
}
