//! Rules about renewing leases.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, Fenced, RenewOutcome, Renewal, Resolution};

/// A renewal counts from the moment when it is carried out. It can also shorten a lease.
pub(super) async fn a_renewal_sets_the_lease_anew(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    for lease in [LONG * 3, LONG, LONG * 2] {
        assert_eq!(
            store.renew_one(&owner.attempt, lease).await,
            RenewOutcome::Renewed,
            "renewal by the owner"
        );
        let left = lease_of(&other.get(&owner, "after the renewal").await);
        assert!(
            left <= lease && left > lease - LONG / 2,
            "{left:?} are left of a lease renewed to {lease:?}"
        );
    }
}

/// A renewed lease keeps other attempts out for as long as it lasts, and no longer.
pub(super) async fn a_renewed_lease_keeps_others_out_until_it_runs_out(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&owner, "first claim").await;
    assert_eq!(
        store.renew_one(&owner.attempt, fixture.lease() * 3).await,
        RenewOutcome::Renewed,
        "renewal by the owner"
    );
    run_out(fixture).await;
    store.be_refused(&retry_of(&owner), "the first lease is over, the renewed one is not").await;
    run_out(fixture).await;
    run_out(fixture).await;
    let won = store.win(&retry_of(&owner), "the renewed lease is over").await;
    assert_eq!(won, (owner.record_id, 2), "id and number of the takeover");
}

/// An owner can renew a lapsed lease if no other attempt took the record.
pub(super) async fn a_lapsed_lease_that_nobody_took_is_renewed(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = Claim { lease: fixture.lease(), ..claim_of("k") };
    let last_permitted = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("last permitted") };
    store.win(&owner, "first claim").await;
    store.win(&last_permitted, "first claim").await;
    run_out(fixture).await;
    for claim in [owner, last_permitted] {
        assert_eq!(
            store.renew_one(&claim.attempt, LONG).await,
            RenewOutcome::Renewed,
            "renewal of a lapsed lease"
        );
        let shown = other.be_refused(&retry_of(&claim), "the lapsed lease was renewed").await;
        assert!(lease_of(&shown) > LONG / 2, "the renewed lease");
        assert_eq!(
            (shown.attempt_number, shown.abandoned),
            (1, 0),
            "a renewed attempt was counted as abandoned"
        );
    }
}

/// A renewal is lost if the record is another attempt's, completed or gone.
pub(super) async fn a_renewal_without_ownership_is_lost(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let [strangers, completed, released, evicted, resolved] =
        ["stranger's", "completed", "released", "evicted", "resolved"].map(claim_of);
    for claim in [&strangers, &completed, &released, &evicted, &resolved] {
        store.win(claim, "first claim").await;
    }
    store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    store.release(&released.attempt).await;
    store.evict(&evicted).await;
    store.hold(&resolved.attempt).await;
    store.resolve(&resolved, Resolution::Complete(response("r"))).await;

    let attempts = [
        retry_of(&strangers).attempt,
        completed.attempt,
        released.attempt,
        evicted.attempt,
        resolved.attempt,
        claim_of("never claimed").attempt,
    ];
    for attempt in attempts {
        assert_eq!(
            store.renew_one(&attempt, LONG * 9).await,
            RenewOutcome::Lost,
            "renewal; {:?}",
            attempt.key
        );
    }
    let lease = lease_of(&store.get(&strangers, "after a stranger's renewal").await);
    assert!(lease <= LONG, "a stranger's renewal extended the lease to {lease:?}");
}

/// A held record is not renewed, but its attempt learns that it may still complete.
pub(super) async fn a_renewal_of_a_held_record_is_skipped(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = claim_of("k");
    store.win_and_hold(&owner).await;
    let before = store.get(&owner, "after the hold").await;
    assert_eq!(
        store.renew_one(&owner.attempt, LONG).await,
        RenewOutcome::Skipped,
        "renewal of a held record"
    );
    assert_eq!(store.get(&owner, "after the renewal").await, before, "a renewal changed a held record");
    let stranger = retry_of(&owner).attempt;
    assert_eq!(store.renew_one(&stranger, LONG).await, RenewOutcome::Lost, "renewal by another attempt");
}

/// The answers come in the order of the renewals.
pub(super) async fn renewals_are_answered_in_their_order(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let mine: Vec<Claim> = ["z", "a", "m", "B", "0"].into_iter().map(claim_of).collect();
    for claim in &mine {
        store.win(claim, "first claim").await;
    }
    assert_eq!(store.hold(&mine[2].attempt).await, Fenced::Applied, "the owner could not hold its record");
    let absent = claim_of("absent");
    let attempts = [
        &absent.attempt,
        &mine[0].attempt,
        &retry_of(&mine[1]).attempt,
        &mine[4].attempt,
        &mine[2].attempt,
        &mine[1].attempt,
        &retry_of(&mine[0]).attempt,
        &mine[3].attempt,
    ];
    let leases = attempts.iter().zip(2..).map(|(attempt, n)| Renewal::new((*attempt).clone(), LONG * n));
    let renewals: Vec<Renewal> = leases.collect();

    let (lost, renewed, skipped) = (RenewOutcome::Lost, RenewOutcome::Renewed, RenewOutcome::Skipped);
    let expected = [lost, renewed, lost, renewed, skipped, renewed, lost, renewed];
    assert_eq!(store.renew(&renewals).await, expected, "answers to eight renewals, in their order");
    for (claim, lease) in
        [(&mine[0], LONG * 3), (&mine[4], LONG * 5), (&mine[1], LONG * 7), (&mine[3], LONG * 9)]
    {
        let left = lease_of(&store.get(claim, "after the renewal").await);
        assert!(
            left <= lease && left > lease - LONG / 2,
            "{left:?} are left of a lease renewed to {lease:?}"
        );
    }
}

/// A call without renewals returns no answers.
pub(super) async fn no_renewals_have_no_answers(fixture: &dyn Fixture) {
    assert!(handle(fixture).await.renew(&[]).await.is_empty(), "no renewals were answered");
}

/// One call renews hundreds of leases.
pub(super) async fn many_leases_are_renewed_by_one_call(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let claims: Vec<Claim> = (0..300).map(|n| claim_of(&format!("key {n}"))).collect();
    for claim in &claims {
        store.win(claim, "first claim").await;
    }
    let renewals: Vec<Renewal> =
        claims.iter().map(|claim| Renewal::new(claim.attempt.clone(), LONG * 3)).collect();
    let outcomes = store.renew(&renewals).await;
    assert_eq!(outcomes, vec![RenewOutcome::Renewed; 300], "answers to 300 renewals by their owners");
    let last = store.get(&claims[299], "after the renewal").await;
    assert!(lease_of(&last) > LONG * 2, "the last of 300 leases was not renewed");
}

/// Two processes renew the same leases in opposite order: neither waits for the other, and no lease
/// is lost.
pub(super) async fn simultaneous_renewals_lose_no_lease(fixture: &dyn Fixture) {
    let [left, right] = two_handles(fixture).await;
    let claims: Vec<Claim> = (0..50).map(|n| claim_of(&format!("key {n}"))).collect();
    for claim in &claims {
        left.win(claim, "first claim").await;
    }
    let forward: Vec<Renewal> =
        claims.iter().map(|claim| Renewal::new(claim.attempt.clone(), LONG)).collect();
    let backward: Vec<Renewal> = forward.iter().rev().cloned().collect();
    let tasks = (0..8).map(|n| {
        let (store, renewals) =
            if n % 2 == 0 { (left.clone(), forward.clone()) } else { (right.clone(), backward.clone()) };
        async move { store.renew(&renewals).await }
    });
    for outcomes in at_once(tasks).await {
        assert_eq!(outcomes.len(), 50, "number of answers to 50 renewals");
        assert!(
            !outcomes.contains(&RenewOutcome::Lost),
            "an owner was told that it lost its lease: {outcomes:?}"
        );
    }
}
