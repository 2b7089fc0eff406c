//! Keeps a request before its handler runs.

use bytes::Bytes;
use http::{HeaderName, header, request::Parts};
use tokio::time::{Instant, timeout};

use super::encoded::encode;
use crate::{
    Claim, Fenced, RecordId, StoreError,
    consumer::OTHER_CREDENTIALS,
    settings::Settings,
    shared::{Shared, flatten},
};

impl Settings {
    /// Whether a header is one that is never kept.
    pub(super) fn is_credential(&self, name: &HeaderName) -> bool {
        CREDENTIALS.contains(name)
            || OTHER_CREDENTIALS.contains(&name.as_str())
            || self.consumer.header_name() == Some(name)
    }

    /// Refuses to keep credentials.
    #[track_caller]
    pub(crate) fn check_kept_requests(&self) {
        let Some(kept) = &self.kept_requests else { return };
        if let Some(name) = kept.headers.iter().find(|name| self.is_credential(name)) {
            panic!(
                "{name} identifies who sends a request and cannot be kept with it: remove it from KeptRequests; what \
                 Restore puts back takes its place"
            );
        }
        if let Some(name) = self.fingerprinter.headers().find(|name| self.is_credential(name)) {
            panic!(
                "the fingerprint covers {name}, which identifies who sends a request and cannot be kept with it, so that \
                 a request that is sent again would never be the same: remove it from the Fingerprinter"
            );
        }
    }
}

impl Shared {
    /// Keeps the request of an attempt, in the time in which the attempt surely owns its record.
    pub(crate) async fn keep_request(
        &self,
        settings: &Settings,
        claim: &Claim,
        claimed_at: Instant,
        record: RecordId,
        (parts, body): (&Parts, &Bytes),
    ) -> Result<Fenced, StoreError> {
        let Some(kept) = &settings.kept_requests else { return Ok(Fenced::Applied) };
        let recovery = self.recovery()?;
        let (attempt, request) = (claim.attempt.clone(), encode(settings, parts, body));
        let after = claim.lease.saturating_add(kept.abandoned_after);
        let usable = (claim.lease * 3 / 4).saturating_sub(claimed_at.elapsed());
        let limit = settings.store_timeout.min(usable);
        let task = async move { recovery.keep_request(&attempt, record, &request, after).await };
        flatten(timeout(limit, self.tasks.spawn(task)).await, limit)
    }
}

const CREDENTIALS: [HeaderName; 3] = [header::AUTHORIZATION, header::COOKIE, header::PROXY_AUTHORIZATION];
