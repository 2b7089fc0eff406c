//! Rules about time, which is the clock of the store alone.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, RenewOutcome, Resolution, ResolveOutcome};

/// A machine whose clock is ahead cannot take over a lease that is alive.
pub(super) async fn a_clock_that_is_ahead_steals_no_lease(fixture: &dyn Fixture) {
    let (store, ahead) = (handle(fixture).await, ahead(fixture).await);
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    ahead.be_refused(&retry_of(&owner), "the lease is alive by the store's clock").await;
    let outcome = ahead.resolve(&owner, Resolution::Release).await;
    assert_eq!(outcome, ResolveOutcome::InProgress, "resolved by a machine whose clock is ahead");
    let left = lease_of(&ahead.get(&owner, "seen by a machine whose clock is ahead").await);
    assert!(left > LONG / 2, "{left:?} are left of a fresh lease, seen by a machine whose clock is ahead");
}

/// A machine whose clock is ahead finds no record expired too early.
pub(super) async fn a_clock_that_is_ahead_expires_nothing(fixture: &dyn Fixture) {
    let (store, ahead) = (handle(fixture).await, ahead(fixture).await);
    let owner = Claim { retention: LONG, ..claim_of("k") };
    store.win_and_complete(&owner, response("r")).await;
    assert_eq!(ahead.purge(100).await, 0, "purged by a machine whose clock is ahead");
    let shown = ahead.be_refused(&other_request(&owner), "not expired by the store's clock").await;
    assert_eq!(response_of(&shown), "r", "response of the record");
}

/// A lease or a retention lasts no longer if it comes from a machine whose clock is ahead.
pub(super) async fn a_clock_that_is_ahead_makes_no_lease_longer(fixture: &dyn Fixture) {
    let (store, ahead) = (handle(fixture).await, ahead(fixture).await);
    let claimed = Claim { lease: fixture.lease(), ..claim_of("claimed") };
    let renewed = claim_of("renewed");
    let expiring = Claim { retention: fixture.lease(), ..claim_of("expiring") };
    ahead.win(&claimed, "first claim").await;
    ahead.win(&renewed, "first claim").await;
    ahead.win_and_complete(&expiring, response("r")).await;
    assert_eq!(
        ahead.renew_one(&renewed.attempt, fixture.lease()).await,
        RenewOutcome::Renewed,
        "renewal by the owner"
    );
    run_out(fixture).await;

    assert_eq!(store.win(&retry_of(&claimed), "the lease ran out").await.1, 2, "attempt number");
    assert_eq!(store.win(&retry_of(&renewed), "the renewed lease ran out").await.1, 2, "attempt number");
    assert_eq!(store.win(&retry_of(&expiring), "the record is expired").await.1, 1, "attempt number");
}

async fn ahead(fixture: &dyn Fixture) -> Handle {
    Handle::new(fixture.open_with_clock_ahead(LONG * 2).await)
}
