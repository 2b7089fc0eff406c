//! Rules about leases that ran out, and about who takes the record over.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Fixture, claims::race, support::*};
use crate::stored::record::{AttemptId, Claim, ClaimOutcome, Fenced, RecordId, RecordState};

/// The same request takes over a lapsed lease: same record, next attempt number, one more abandoned
/// attempt.
pub(super) async fn a_lapsed_lease_is_taken_over_by_the_same_request(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&first, "first claim").await;
    let before = store.get(&first, "before the takeover").await;
    store.be_refused(&retry_of(&first), "the lease is alive").await;
    run_out(fixture).await;

    let second = Claim { lease: LONG, retention: LONG, ..retry_of(&first) };
    let won = other.win(&second, "the lease ran out").await;
    assert_eq!(won, (first.record_id, 2), "id and number of a record that was taken over");

    let record = store.get(&first, "after the takeover").await;
    assert_eq!(record.attempt, Some(second.attempt.id), "attempt after the takeover");
    assert_eq!((record.attempt_number, record.abandoned), (2, 1), "attempt number and abandoned attempts");
    assert!(lease_of(&record) > LONG / 2, "the new lease is {:?}", lease_of(&record));
    assert_eq!(record.created_at, before.created_at, "a takeover moved the time of making");
    assert_eq!(record.expires_at, before.expires_at, "a takeover moved the expiry");
}

/// Each takeover increases the attempt number and the number of abandoned attempts by one.
pub(super) async fn attempt_numbers_count_the_takeovers(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let first = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&first, "first claim").await;
    for number in 2..=4 {
        run_out(fixture).await;
        let won = store.win(&retry_of(&first), "the lease ran out").await;
        assert_eq!(won, (first.record_id, number), "id and number after takeovers");
        let abandoned = store.get(&first, "after a takeover").await.abandoned;
        assert_eq!(u32::from(abandoned), number - 1, "abandoned attempts after takeovers");
    }
}

/// Of many claims at the moment when a lease runs out, exactly one takes the record over.
pub(super) async fn a_lapsed_lease_is_taken_over_by_exactly_one(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    for round in 0..2 {
        let first = Claim { lease: fixture.lease(), ..claim_of(&format!("round {round}")) };
        handles[0].win(&first, "first claim").await;
        let claims = (0..24).map(|_| Claim { lease: LONG, ..retry_of(&first) }).collect();
        let winners = race_until_won(fixture, &handles, claims).await;
        assert_eq!(winners.len(), 1, "takeovers of one lapsed lease: {winners:?}");
        assert_eq!((winners[0].1, winners[0].2), (first.record_id, 2), "id and number of the takeover");
        let record = handles[1].get(&first, "after the takeover").await;
        assert_eq!(
            record.attempt,
            Some(winners[0].0),
            "the record belongs to another attempt than the winner"
        );
        assert_eq!(
            (record.attempt_number, record.abandoned),
            (2, 1),
            "one lapsed lease was counted otherwise"
        );
    }
}

/// Of many simultaneous claims that find a lease lapsed long ago, exactly one takes the record
/// over.
pub(super) async fn of_many_simultaneous_takeovers_exactly_one_wins(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let firsts: Vec<Claim> =
        (0..5).map(|n| Claim { lease: fixture.lease(), ..claim_of(&format!("key {n}")) }).collect();
    for first in &firsts {
        handles[0].win(first, "first claim").await;
    }
    run_out(fixture).await;
    for first in &firsts {
        let claims = (0..32).map(|_| Claim { lease: LONG, ..retry_of(first) }).collect();
        let winners = race(&handles, claims).await;
        assert_eq!(winners.len(), 1, "takeovers of one lapsed lease: {winners:?}");
        assert_eq!((winners[0].1, winners[0].2), (first.record_id, 2), "id and number of the takeover");
    }
}

/// A different request under the same key changes nothing, whatever state the record is in.
pub(super) async fn a_different_request_never_gets_the_key(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let alive = claim_of("alive");
    let lapsed = Claim { lease: fixture.lease(), ..claim_of("lapsed") };
    let last_lapsed =
        Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("last permitted attempt lapsed") };
    let held = claim_of("held");
    let completed = claim_of("completed");
    for claim in [&alive, &lapsed, &last_lapsed, &held, &completed] {
        store.win(claim, "first claim").await;
    }
    assert_eq!(store.hold(&held.attempt).await, Fenced::Applied, "the owner could not hold its record");
    store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    run_out(fixture).await;

    for claim in [&alive, &lapsed, &last_lapsed, &held, &completed] {
        let state = claim.attempt.key.as_str();
        let before = but_for_the_lease(store.get(claim, state).await);
        let shown = store.be_refused(&other_request(claim), &format!("a different request; {state}")).await;
        assert_eq!(shown.fingerprint, claim.fingerprint, "the fingerprint shown; {state}");
        let after = but_for_the_lease(store.get(claim, state).await);
        assert_eq!(after, before, "a different request changed the record; {state}");
    }
    let won = store.win(&retry_of(&lapsed), "the same request after a different one").await;
    assert_eq!(won, (lapsed.record_id, 2), "id and number of the takeover");
}

/// A record whose lease ran out is in progress, with nothing left of the lease.
pub(super) async fn a_lapsed_lease_shows_nothing_remaining(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let claim = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&claim, "first claim").await;
    run_out(fixture).await;
    let record = store.get(&claim, "after the lease").await;
    assert_eq!(record.state, RecordState::in_progress(Duration::ZERO), "state after the lease");
    assert_eq!(
        record.attempt,
        Some(claim.attempt.id),
        "a lapsed lease that no other attempt took is still its owner's"
    );
}

/// Lets each claim try again until one was won and the others have had time to win as well.
pub(super) async fn race_until_won(
    fixture: &dyn Fixture,
    handles: &[Handle; 2],
    claims: Vec<Claim>,
) -> Vec<(AttemptId, RecordId, u32)> {
    let until = Instant::now() + fixture.lease() * 3 / 2;
    // The claims begin before the lease runs out, so that they meet the moment when it does.
    sleep(fixture.lease() * 3 / 4).await;
    let tasks = claims.into_iter().enumerate().map(|(n, claim)| {
        let store = handles[n % 2].clone();
        async move {
            while Instant::now() < until {
                if let ClaimOutcome::Won { record_id, attempt_number, .. } = store.claim(&claim).await {
                    return Some((claim.attempt.id, record_id, attempt_number));
                }
                sleep(Duration::from_millis(3)).await;
            }
            None
        }
    });
    at_once(tasks).await.into_iter().flatten().collect()
}
