//! Rules about who wins a key.

use std::{sync::Arc, time::Duration};

use tokio::sync::Barrier;

use super::{Fixture, support::*};
use crate::stored::record::{
    AttemptId, Claim, ClaimOutcome, Fenced, RecordFilter, RecordId, RecordState, RenewOutcome,
};

/// Preparing a store twice, also by two processes simultaneously, does no harm.
pub(super) async fn a_store_may_be_prepared_many_times_at_once(fixture: &dyn Fixture) {
    let [left, right] = two_handles(fixture).await;
    at_once([left.clone(), right, left.clone()].map(|store| async move { store.prepare().await })).await;
    left.win(&claim_of("k"), "after three preparations").await;
    left.prepare().await;
    assert!(left.find(&claim_of("k")).await.is_some(), "preparing a store again lost a record");
}

/// A claim of an absent key is won. The record has the id that the claim brought, and attempt
/// number 1.
pub(super) async fn the_first_claim_of_a_key_makes_its_record(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let claim = claim_of("k");
    assert!(store.find(&claim).await.is_none(), "a fresh storage has a record");

    let won = store.win(&claim, "a claim of an absent key").await;
    assert_eq!(won, (claim.record_id, 1), "id and attempt number of a new record");

    let record = other.get(&claim, "another handle after a claim was won").await;
    assert_eq!(record.id, claim.record_id, "id of the record");
    assert_eq!(record.fingerprint, claim.fingerprint, "fingerprint of the record");
    assert_eq!(record.attempt, Some(claim.attempt.id), "attempt of the record");
    assert_eq!((record.attempt_number, record.abandoned), (1, 0), "attempt number and abandoned attempts");
    let lease = lease_of(&record);
    assert!(lease <= LONG && lease > LONG / 2, "{lease:?} are left of a fresh lease of {LONG:?}");
}

/// A new record expires one retention after it was made. A completion does not move the expiry.
pub(super) async fn the_retention_counts_from_the_claim(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let claim = claim_of("k");
    store.win(&claim, "a claim of an absent key").await;
    let made = store.get(&claim, "after the claim").await;
    let kept = made.expires_at.duration_since(made.created_at).unwrap_or_default();
    let off_by = kept.abs_diff(claim.retention);
    assert!(off_by.as_millis() <= 2, "a retention of {:?} keeps the record for {kept:?}", claim.retention);

    store.complete_as_owner(&claim.attempt, response("r"), "by the owner").await;
    let completed = store.get(&claim, "after the completion").await;
    assert_eq!(completed.expires_at, made.expires_at, "a completion moved the expiry");
}

/// The largest settings are used as they are: a retention of a century, and as many attempts and
/// rows as a caller can ask for.
pub(super) async fn the_largest_settings_are_taken(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let century = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    let claim =
        Claim { lease: fixture.lease(), retention: century, max_abandoned: u16::MAX, ..claim_of("k") };
    store.win(&claim, "with the largest settings").await;
    run_out(fixture).await;
    let won = store.win(&retry_of(&claim), "abandoned once of 65,535 times").await;
    assert_eq!(won, (claim.record_id, 2), "id and number of the takeover");
    let outcome = store.renew_one(&claim.attempt, century).await;
    assert_eq!(outcome, RenewOutcome::Lost, "renewal by the attempt that was taken over");

    let record = store.get(&claim, "with the largest settings").await;
    let kept = record.expires_at.duration_since(record.created_at).unwrap_or_default();
    assert!(
        kept.abs_diff(century).as_millis() <= 2,
        "a retention of {century:?} keeps the record for {kept:?}"
    );
    assert_eq!(store.purge(u32::MAX).await, 0, "purged records before any has expired");
    assert_eq!(store.list(RecordFilter::All, u32::MAX).await.len(), 1, "number of records");
}

/// Of many simultaneous claims of an absent key, through several handles, exactly one is won.
pub(super) async fn of_many_simultaneous_claims_exactly_one_wins(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    for round in 0..5 {
        let first = claim_of(&format!("round {round}"));
        let claims = (0..32).map(|_| retry_of(&first)).collect();
        let winners = race(&handles, claims).await;
        assert_eq!(winners.len(), 1, "winners among 32 simultaneous claims of an absent key: {winners:?}");
        let record = handles[0].get(&first, "after a race for the key").await;
        assert_eq!(
            record.attempt,
            Some(winners[0].0),
            "the record belongs to another attempt than the winner"
        );
        assert_eq!(
            (record.id, record.attempt_number),
            (winners[0].1, winners[0].2),
            "what the winner was told"
        );
    }
}

/// Of different requests that race for an absent key, exactly one wins. The record holds the
/// winner's values only.
pub(super) async fn of_many_simultaneous_different_requests_exactly_one_wins(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    for round in 0..5 {
        let first = claim_of(&format!("round {round}"));
        let claims: Vec<Claim> = (0..16)
            .map(|n| Claim { fingerprint: fingerprint(&format!("request {n}")), ..retry_of(&first) })
            .collect();
        let winners = race(&handles, claims.clone()).await;
        assert_eq!(winners.len(), 1, "winners among 16 simultaneous claims of an absent key: {winners:?}");
        let record = handles[1].get(&first, "after a race for the key").await;
        let winner = claims.iter().find(|claim| claim.attempt.id == winners[0].0);
        assert_eq!(
            Some(&record.fingerprint),
            winner.map(|claim| &claim.fingerprint),
            "fingerprint of the winner"
        );
        assert_eq!(record.id, winners[0].1, "record id of the winner");
    }
}

/// Simultaneous claims of different keys are all won.
pub(super) async fn simultaneous_claims_of_different_keys_are_all_won(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let claims: Vec<Claim> = (0..64).map(|n| claim_of(&format!("key {n}"))).collect();
    let winners = race(&handles, claims).await;
    assert_eq!(winners.len(), 64, "of 64 claims of 64 absent keys, {} were won", winners.len());
    assert!(winners.iter().all(|(_, _, number)| *number == 1), "a new record's attempt number is not 1");
}

/// A claim that finds the key taken shows the record and does not change it.
pub(super) async fn a_claim_of_a_taken_key_changes_nothing(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    let before = store.get(&owner, "before").await;

    let impatient = Claim { lease: LONG * 10, retention: LONG, max_abandoned: 1, ..retry_of(&owner) };
    for refused in [impatient, other_request(&owner)] {
        let shown = store.be_refused(&refused, "while the owner's lease is alive").await;
        assert!(lease_of(&shown) <= lease_of(&before), "a refused claim extended the lease");
        assert_eq!(
            but_for_the_lease(shown),
            but_for_the_lease(before.clone()),
            "the record that a claim shows"
        );
    }

    let after = store.get(&owner, "after").await;
    assert!(lease_of(&after) <= lease_of(&before), "a refused claim extended the lease");
    assert_eq!(but_for_the_lease(after), but_for_the_lease(before), "a refused claim changed the record");
}

/// An attempt that claims again wins again, with the same record and number.
pub(super) async fn a_repeated_claim_by_the_same_attempt_is_won_again(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let claim = claim_of("k");
    let won = store.win(&claim, "first claim").await;
    for _ in 0..3 {
        let again = other.win(&claim, "the same attempt once more").await;
        assert_eq!(again, won, "id and number of a claim that is repeated");
    }
    let repeated = Claim { record_id: RecordId::random(), ..claim.clone() };
    assert_eq!(store.win(&repeated, "with a new record id").await, won, "id and number of a repeated claim");
    let record = store.get(&claim, "after repeated claims").await;
    assert_eq!((record.attempt_number, record.abandoned), (1, 0), "a repeated claim was counted");
}

/// Simultaneous claims by the same attempt, if they win, get the same record and number.
pub(super) async fn simultaneous_claims_by_the_same_attempt_agree(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let claim = claim_of("k");
    let winners = race(&handles, vec![claim.clone(); 16]).await;
    assert!(!winners.is_empty(), "an attempt that claimed 16 times simultaneously did not win");
    assert!(
        winners.iter().all(|winner| *winner == (claim.attempt.id, claim.record_id, 1)),
        "an attempt was told different things: {winners:?}"
    );
    assert_eq!(
        handles[0].win(&claim, "the same attempt afterwards").await,
        (claim.record_id, 1),
        "afterwards"
    );
}

/// A repeated claim is won even after its lease ran out, if no other attempt took the record.
pub(super) async fn a_repeated_claim_is_won_again_after_its_lease(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let claim = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("k") };
    let won = store.win(&claim, "first claim").await;
    run_out(fixture).await;
    assert_eq!(store.win(&claim, "the same attempt, late").await, won, "id and number of a repeated claim");
}

/// An attempt that has completed its record, or made it held, does not win it again.
pub(super) async fn an_ended_attempt_does_not_win_again(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let completed = claim_of("completed");
    store.win_and_complete(&completed, response("r")).await;
    let shown = store.be_refused(&completed, "the attempt has completed").await;
    assert_eq!(response_of(&shown), "r", "response shown to the attempt that stored it");

    let held = claim_of("held");
    store.win_and_hold(&held).await;
    let shown = store.be_refused(&held, "the record is held").await;
    assert_eq!(shown.state, RecordState::Held, "state of the record");
}

/// A released key is claimable immediately, even by a different request. The claim makes a new
/// record.
pub(super) async fn a_released_key_is_claimable_at_once(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = claim_of("k");
    store.win(&first, "first claim").await;
    assert_eq!(store.release(&first.attempt).await, Fenced::Applied, "the owner could not release");

    let second = other_request(&first);
    let won = other.win(&second, "after the release, by a different request").await;
    assert_eq!(won, (second.record_id, 1), "id and number of the record after a release");
    let record = store.get(&second, "after the second claim").await;
    assert_eq!(record.fingerprint, second.fingerprint, "fingerprint after a release");
}

/// Claims a key by many tasks simultaneously, alternating between the handles. Returns the outcomes
/// that the winners got.
pub(super) async fn race(handles: &[Handle; 2], claims: Vec<Claim>) -> Vec<(AttemptId, RecordId, u32)> {
    // The barrier makes all claims start together, so that they really race.
    let barrier = Arc::new(Barrier::new(claims.len()));
    let tasks = claims.into_iter().enumerate().map(|(n, claim)| {
        let (store, barrier) = (handles[n % 2].clone(), Arc::clone(&barrier));
        async move {
            barrier.wait().await;
            match store.claim(&claim).await {
                ClaimOutcome::Won { record_id, attempt_number, .. } => {
                    Some((claim.attempt.id, record_id, attempt_number))
                }
                ClaimOutcome::Exists(_) | ClaimOutcome::Contended => None,
            }
        }
    });
    at_once(tasks).await.into_iter().flatten().collect()
}
