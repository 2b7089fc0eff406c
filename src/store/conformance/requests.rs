//! Rules about keeping requests and their records, and about purging kept requests.

use std::time::Duration;

use bytes::Bytes;

use super::{Fixture, support::*};
use crate::stored::{
    record::{Attempt, Claim, Fenced, RecordId, RecordState, RenewOutcome},
    request::{KeptRequest, RequestUpdate},
};

impl Recovery {
    pub(super) async fn keep(&self, claim: &Claim, request: &Bytes, after: Duration) -> Fenced {
        let kept = self.inner.keep_request(&claim.attempt, claim.record_id, request, after).await;
        expected(kept, "keep_request")
    }

    async fn must_not_keep(&self, claim: &Claim, why: &str) {
        assert_eq!(self.keep(claim, &request(), Duration::ZERO).await, Fenced::Lost, "{why}");
    }

    /// Wins a key and keeps its request, which is due immediately.
    pub(super) async fn win_with_request(&self, claim: &Claim) {
        self.store.win(claim, "first claim").await;
        assert_eq!(self.keep(claim, &request(), Duration::ZERO).await, Fenced::Applied, "kept by the owner");
    }

    pub(super) async fn retain_record(&self, claim: &Claim) -> Fenced {
        let Attempt { consumer, key, .. } = &claim.attempt;
        expected(self.inner.retain_record(consumer, key, claim.record_id).await, "retain_record")
    }

    /// Lets the lease of an attempt run out almost immediately.
    pub(super) async fn lapse(&self, claim: &Claim) {
        let renewed = self.store.renew_one(&claim.attempt, Duration::from_millis(1)).await;
        assert_eq!(renewed, RenewOutcome::Renewed, "a renewal by the owner");
        fall_due().await;
    }

    /// Releases a record by its attempt in such a way that the record stays.
    pub(super) async fn abandon(&self, claim: &Claim) {
        assert_eq!(self.retain_record(claim).await, Fenced::Applied, "retain_record");
        assert_eq!(self.store.release(&claim.attempt).await, Fenced::Applied, "release by the owner");
    }

    /// Makes a record that waits for the next attempt. Its request is due immediately.
    pub(super) async fn abandoned_request(&self, key: &str) -> Claim {
        let claim = claim_of(key);
        self.win_with_request(&claim).await;
        self.abandon(&claim).await;
        claim
    }

    /// Takes at most 100 requests. First waits until those without a delay are due.
    pub(super) async fn take_requests(&self, pause: Duration) -> Vec<KeptRequest> {
        fall_due().await;
        expected(self.inner.take_abandoned(100, pause).await, "take_abandoned")
    }

    /// Takes the requests that are due, for an hour. Returns their keys.
    pub(super) async fn keys_taken(&self) -> Vec<String> {
        let taken = self.take_requests(LONG).await;
        let mut keys: Vec<_> = taken.iter().map(|request| request.key.as_str().to_owned()).collect();
        keys.sort();
        keys
    }

    /// Takes the one request that is due.
    pub(super) async fn take_request(&self, why: &str) -> KeptRequest {
        let mut taken = self.take_requests(LONG).await;
        assert_eq!(taken.len(), 1, "{why}: requests that are due");
        taken.remove(0)
    }

    pub(super) async fn update_request(
        &self,
        record: RecordId,
        tries: Option<u32>,
        update: RequestUpdate,
    ) -> Fenced {
        expected(self.inner.update_request(record, tries, &update).await, "update_request")
    }

    /// Returns `true` if the request of a record is kept. Asks as an operator, by having it sent
    /// again.
    pub(super) async fn has_request(&self, record: RecordId) -> bool {
        self.update_request(record, None, send_again(Duration::ZERO)).await == Fenced::Applied
    }
}

pub(super) fn request() -> Bytes {
    Bytes::from_static(b"a request")
}

pub(super) fn send_again(after: Duration) -> RequestUpdate {
    RequestUpdate::SendAgain { after, tried: true }
}

/// Only the attempt that owns the record with a live lease keeps a request. For any other attempt,
/// nothing is kept.
pub(super) async fn a_request_is_kept_by_the_attempt_that_owns_its_record(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let [owned, completed, held] = ["owned", "completed", "held"].map(claim_of);
    recovery.must_not_keep(&owned, "there is no record").await;
    for claim in [&owned, &completed, &held] {
        recovery.store.win(claim, "first claim").await;
    }
    let retry = retry_of(&owned);
    recovery.must_not_keep(&retry, "it is another attempt's and another id").await;
    let other = Claim { record_id: owned.record_id, ..retry.clone() };
    recovery.must_not_keep(&other, "it is another attempt's").await;
    let other = Claim { record_id: RecordId::random(), ..owned.clone() };
    recovery.must_not_keep(&other, "it is another record").await;
    recovery.store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    recovery.must_not_keep(&completed, "it is completed").await;
    assert_eq!(recovery.store.hold(&held.attempt).await, Fenced::Applied, "hold by the owner");
    recovery.must_not_keep(&held, "it is held").await;
    let lapsed = claim_of("lapsed");
    recovery.store.win(&lapsed, "first claim").await;
    recovery.lapse(&lapsed).await;
    recovery.must_not_keep(&lapsed, "the lease has run out").await;
    for record in [&owned, &retry, &other, &completed, &held, &lapsed].map(|claim| claim.record_id) {
        assert!(!recovery.has_request(record).await, "a request that was not to be kept");
    }
    assert_eq!(recovery.keep(&owned, &request(), Duration::ZERO).await, Fenced::Applied, "by the owner");
    assert!(recovery.has_request(owned.record_id).await, "a kept request");
}

/// A request is returned as it was kept, with the consumer and key of its record.
pub(super) async fn a_kept_request_is_shown_as_it_was_kept(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let bytes: Bytes = (0..=u8::MAX).chain(*b"'; --\r\n").collect();
    let claim = Claim { attempt: Attempt::new(consumer("' ä \\"), key_of("' k \\")), ..claim_of("k") };
    recovery.store.win(&claim, "first claim").await;
    assert_eq!(recovery.keep(&claim, &bytes, Duration::ZERO).await, Fenced::Applied, "kept by the owner");
    recovery.abandon(&claim).await;
    let Attempt { consumer, key, .. } = claim.attempt;
    let mut expected = KeptRequest::new(claim.record_id, consumer, key, bytes);
    expected.tries = 1;
    assert_eq!(recovery.take_request("it is abandoned").await, expected, "what is taken");
}

/// The first request of a record counts. A later one changes neither the kept request, nor its
/// time, nor its tries.
pub(super) async fn the_first_request_of_a_record_counts(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.win_with_request(&claim).await;
    let other = Bytes::from_static(b"another request");
    assert_eq!(recovery.keep(&claim, &other, LONG).await, Fenced::Applied, "kept again by the owner");
    recovery.lapse(&claim).await;
    for attempt_number in [2, 3] {
        let retry = Claim { record_id: claim.record_id, ..retry_of(&claim) };
        assert_eq!(recovery.store.win(&retry, "it was abandoned").await, (claim.record_id, attempt_number));
        assert_eq!(recovery.keep(&retry, &other, LONG).await, Fenced::Applied, "kept by the next attempt");
        recovery.abandon(&retry).await;
        if attempt_number == 2 {
            let taken = recovery.take_request("the first was due immediately").await;
            assert_eq!((taken.request, taken.tries), (request(), 1), "what is taken");
        }
    }
    let again = recovery.update_request(claim.record_id, Some(1), send_again(Duration::ZERO)).await;
    assert_eq!(again, Fenced::Applied, "it was tried once");
    let taken = recovery.take_request("it is due again").await;
    assert_eq!((taken.request, taken.tries), (request(), 2), "what is taken");
}

/// A retained record stays when its attempt releases it: its id, fingerprint and attempt number go
/// on.
pub(super) async fn a_kept_record_stays_when_it_is_released(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    recovery.abandon(&claim).await;
    let shown = recovery.store.get(&claim, "it was kept").await;
    assert_eq!(shown.state, RecordState::in_progress(Duration::ZERO), "what is shown");
    recovery.store.be_refused(&other_request(&claim), "the record keeps its fingerprint").await;
    let won = recovery.store.win(&retry_of(&claim), "it was released").await;
    assert_eq!(won, (claim.record_id, 2), "id and number");
}

/// A record that is completed or gone is not retained. Nor is another record that has its key.
pub(super) async fn a_record_that_has_ended_is_not_kept(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let [gone, completed] = ["gone", "completed"].map(claim_of);
    assert_eq!(recovery.retain_record(&gone).await, Fenced::Lost, "there is no record");
    recovery.store.win_and_complete(&completed, response("r")).await;
    assert_eq!(recovery.retain_record(&completed).await, Fenced::Lost, "it is completed");
    recovery.store.win(&gone, "first claim").await;
    assert!(recovery.store.evict(&gone).await, "there was a record to evict");
    let next = retry_of(&gone);
    recovery.store.win(&next, "it was evicted").await;
    assert_eq!(recovery.retain_record(&gone).await, Fenced::Lost, "it is another record");
    assert_eq!(recovery.store.release(&next.attempt).await, Fenced::Applied, "release by the owner");
    assert!(recovery.store.find(&next).await.is_none(), "the released record had no intent or request");
}

/// A kept request of any age is purged once its record is completed or gone, and not before.
pub(super) async fn kept_requests_are_purged_once_their_record_is_completed_or_gone(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    recovery.abandoned_request("given up").await;
    recovery.give_up("why").await;
    recovery.abandoned_request("abandoned").await;
    let [running, held, completed, evicted] = ["running", "held", "completed", "evicted"].map(claim_of);
    let replaced = Claim { retention: fixture.lease(), ..claim_of("replaced") };
    for claim in [&running, &held, &completed, &evicted, &replaced] {
        recovery.win_with_request(claim).await;
    }
    assert_eq!(recovery.purge_settled(LONG, 100).await, 0, "purged requests");
    assert_eq!(recovery.store.hold(&held.attempt).await, Fenced::Applied, "hold by the owner");
    recovery.store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    assert!(recovery.store.evict(&evicted).await, "there was a record to evict");
    run_out(fixture).await;
    recovery.lapse(&replaced).await;
    recovery.store.win(&retry_of(&replaced), "the record has expired").await;
    assert_eq!(recovery.purge_settled(LONG, 100).await, 3, "purged requests");
    for claim in [&completed, &evicted, &replaced] {
        assert!(!recovery.has_request(claim.record_id).await, "the request of {:?}", claim.attempt.key);
    }
    assert_eq!(recovery.attention().await, [("given up".to_owned(), "why".to_owned())]);
    assert_eq!(recovery.keys_taken().await, ["abandoned"], "requests that are taken");
    for claim in [&running, &held] {
        assert!(recovery.has_request(claim.record_id).await, "the request of {:?}", claim.attempt.key);
    }
}

/// One call purges no more kept requests than its limit.
pub(super) async fn a_purge_of_kept_requests_keeps_to_its_limit(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for key in ["a", "b", "c"] {
        let claim = claim_of(key);
        recovery.win_with_request(&claim).await;
        recovery.store.complete_as_owner(&claim.attempt, response("r"), "by the owner").await;
    }
    for count in [2, 1, 0] {
        assert_eq!(recovery.purge_settled(LONG, 2).await, count, "purged requests, at most 2");
    }
}

/// A phase that was not finished has no result, not even an empty one.
pub(super) async fn a_phase_that_was_not_finished_is_not_found(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    for why in ["there is no record", "nothing was finished"] {
        let found = recovery.inner.find_phase(&claim.attempt, claim.record_id, "a").await;
        assert_eq!(expected(found, "find_phase"), None, "{why}");
        recovery.store.win(&claim, "a claim").await;
    }
}
