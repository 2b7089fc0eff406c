//! Rules about records past their expiry.

use super::{Fixture, claims::race, support::*, takeover::race_until_won};
use crate::stored::record::{Claim, Fenced};

/// An expired record counts as absent even before it is purged. A claim by any request makes a new
/// record with attempt number 1.
pub(super) async fn an_expired_record_counts_as_absent(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let completed = Claim { retention: fixture.lease(), ..claim_of("completed") };
    let lapsed = Claim { retention: fixture.lease(), lease: fixture.lease(), ..claim_of("lapsed") };
    store.win_and_complete(&completed, response("old")).await;
    store.win(&lapsed, "first claim").await;
    store.be_refused(&retry_of(&completed), "before the expiry").await;
    run_out(fixture).await;

    for old in [completed, lapsed] {
        let new = Claim { retention: LONG, lease: LONG, ..other_request(&old) };
        let won = store.win(&new, "the record is expired").await;
        assert_eq!(won, (new.record_id, 1), "id and number of a key that is used again");
        let record = store.get(&new, "after the claim").await;
        assert_eq!(record.fingerprint, new.fingerprint, "fingerprint of a key that is used again");
        assert_eq!(record.attempt, Some(new.attempt.id), "attempt of a key that is used again");
        assert_eq!(record.abandoned, 0, "abandoned attempts of a key that is used again");
        let left = record.expires_at.duration_since(record.created_at).unwrap_or_default();
        assert!(left.abs_diff(LONG).as_millis() <= 2, "a key that is used again is kept for {left:?}");
        store.be_refused(&retry_of(&new), "the new record's lease is alive").await;
    }
}

/// The same request gets a new record, too, once the old one is expired.
pub(super) async fn an_expired_record_is_not_replayed(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let old = Claim { retention: fixture.lease(), ..claim_of("k") };
    store.win_and_complete(&old, response("old")).await;
    run_out(fixture).await;
    let new = Claim { retention: LONG, ..retry_of(&old) };
    assert_eq!(store.win(&new, "the record is expired").await, (new.record_id, 1), "id and number");
    store.complete_as_owner(&new.attempt, response("new"), "by the owner of the new record").await;
    let shown = store.be_refused(&retry_of(&new), "the new record is completed").await;
    assert_eq!(response_of(&shown), "new", "response of the new record");
}

/// An expired record whose lease is alive is not absent.
pub(super) async fn an_expired_record_with_a_live_lease_is_not_absent(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { retention: fixture.lease(), lease: LONG, ..claim_of("k") };
    store.win(&owner, "first claim").await;
    run_out(fixture).await;
    store.be_refused(&retry_of(&owner), "expired, lease alive").await;
    store.be_refused(&other_request(&owner), "expired, lease alive, a different request").await;
    assert_eq!(store.purge(100).await, 0, "a record with a live lease was purged");
    let record = store.get(&owner, "expired, lease alive").await;
    assert_eq!(record.attempt, Some(owner.attempt.id), "attempt of the record");
    assert_eq!(store.hold(&owner.attempt).await, Fenced::Applied, "the owner's hold");
}

/// Of many claims at the moment of expiry, exactly one is won.
pub(super) async fn an_expired_key_is_won_by_exactly_one(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let old = Claim { retention: fixture.lease(), ..claim_of("k") };
    handles[0].win_and_complete(&old, response("old")).await;
    let claims: Vec<Claim> = (0..24)
        .map(|n| Claim {
            retention: LONG,
            fingerprint: fingerprint(&format!("request {n}")),
            ..retry_of(&old)
        })
        .collect();
    let winners = race_until_won(fixture, &handles, claims.clone()).await;
    assert_eq!(winners.len(), 1, "winners of one expired key: {winners:?}");
    let winner = claims.iter().find(|claim| claim.attempt.id == winners[0].0);
    assert_eq!(
        winner.map(|claim| (claim.record_id, 1)),
        Some((winners[0].1, winners[0].2)),
        "what it was told"
    );
    let record = handles[1].get(&old, "afterwards").await;
    assert_eq!((record.attempt, record.id), (Some(winners[0].0), winners[0].1), "the record is the winner's");
}

/// Of many simultaneous claims of a key that expired long ago, exactly one is won.
pub(super) async fn of_many_simultaneous_claims_of_an_expired_key_exactly_one_wins(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let olds: Vec<Claim> =
        (0..5).map(|n| Claim { retention: fixture.lease(), ..claim_of(&format!("key {n}")) }).collect();
    for old in &olds {
        handles[0].win_and_complete(old, response("old")).await;
    }
    run_out(fixture).await;
    for old in &olds {
        let claims = (0..32).map(|_| Claim { retention: LONG, ..retry_of(old) }).collect();
        let winners = race(&handles, claims).await;
        assert_eq!(winners.len(), 1, "winners of one expired key: {winners:?}");
        assert_eq!(winners[0].2, 1, "attempt number of a key that is used again");
    }
}

/// The attempt of an expired record cannot change the record that has its key now.
pub(super) async fn an_attempt_of_an_expired_record_does_not_reach_the_next(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let old = Claim { lease: fixture.lease(), retention: fixture.lease(), ..claim_of("k") };
    store.win(&old, "first claim").await;
    run_out(fixture).await;
    let new = Claim { lease: LONG, retention: LONG, ..retry_of(&old) };
    assert_eq!(store.win(&new, "the record is expired").await, (new.record_id, 1), "id and number");

    let shown = store.lose_completion(&old.attempt, "its record is gone").await;
    assert_eq!(shown.id, new.record_id, "id of the record shown");
    assert_eq!(
        store.release(&old.attempt).await,
        Fenced::Lost,
        "release by the attempt of an expired record"
    );
    store.be_refused(&retry_of(&new), "the new record's lease is alive").await;
}
