//! Rules about the purge, which deletes records that count as absent.

use std::time::Duration;

use super::{Fixture, support::*};
use crate::stored::record::{Claim, ClaimOutcome, RecordFilter, RenewOutcome};

/// A purge deletes the records that count as absent and spares all others.
pub(super) async fn a_purge_deletes_what_counts_as_absent_and_nothing_else(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let expiring = |key: &str| Claim { lease: fixture.lease(), retention: fixture.lease(), ..claim_of(key) };
    store.win_and_complete(&expiring("completed, expired"), response("r")).await;
    store.win(&expiring("lapsed, expired"), "first claim").await;
    store.win_and_complete(&Claim { lease: fixture.lease(), ..claim_of("completed") }, response("r")).await;
    store.win(&Claim { lease: fixture.lease(), ..claim_of("lapsed") }, "first claim").await;
    store.win(&Claim { retention: fixture.lease(), ..claim_of("lease alive, expired") }, "first claim").await;
    store.win_and_hold(&expiring("held, expired")).await;
    store.win(&Claim { max_abandoned: 1, ..expiring("to be held, expired") }, "first claim").await;
    assert_eq!(store.purge(100).await, 0, "purged records before any has expired");
    run_out(fixture).await;

    assert_eq!(store.purge(100).await, 2, "purged records, of which two count as absent");
    let mut left = store.keys_listed(RecordFilter::All, 100).await;
    left.sort();
    let spared = ["completed", "held, expired", "lapsed", "lease alive, expired", "to be held, expired"];
    assert_eq!(left, spared, "what a purge has spared");
    assert_eq!(store.purge(100).await, 0, "purged records by a second purge");
}

/// A purge deletes at most as many records as its limit, and returns their number.
pub(super) async fn a_purge_keeps_to_its_limit(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    for n in 0..25 {
        let expiring = Claim { retention: fixture.lease(), ..claim_of(&format!("key {n}")) };
        store.win_and_complete(&expiring, response("r")).await;
    }
    run_out(fixture).await;
    assert_eq!(store.purge(0).await, 0, "purged records of at most 0");
    for (deleted, left) in [(10, 15), (10, 5), (5, 0), (0, 0)] {
        assert_eq!(store.purge(10).await, deleted, "purged records of at most 10");
        let listed = store.list(RecordFilter::All, 100).await.len();
        assert_eq!(listed, left, "records that are left");
    }
}

/// Records that cannot be purged do not use up the limit, even if many of them are older.
pub(super) async fn held_records_do_not_use_up_the_limit_of_a_purge(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    for n in 0..12 {
        store.win_and_hold(&Claim { retention: fixture.lease() / 2, ..claim_of(&format!("held {n}")) }).await;
    }
    for n in 0..3 {
        let expiring = Claim { retention: fixture.lease(), ..claim_of(&format!("completed {n}")) };
        store.win_and_complete(&expiring, response("r")).await;
    }
    run_out(fixture).await;
    assert_eq!(store.purge(5).await, 3, "purged records of at most 5, beside 12 held ones");
}

/// A purged key is claimable. The attempt of the purged record cannot change the new one.
pub(super) async fn a_purged_key_is_claimed_anew(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let old = Claim { lease: fixture.lease(), retention: fixture.lease(), ..claim_of("k") };
    store.win(&old, "first claim").await;
    run_out(fixture).await;
    assert_eq!(store.purge(100).await, 1, "purged records");
    assert!(store.find(&old).await.is_none(), "a purged record is found");
    let new = Claim { lease: LONG, retention: LONG, ..other_request(&old) };
    assert_eq!(store.win(&new, "after the purge").await, (new.record_id, 1), "id and number");
    assert_eq!(
        store.renew_one(&old.attempt, LONG).await,
        RenewOutcome::Lost,
        "renewal by the purged attempt"
    );
    store.lose_completion(&old.attempt, "its record was purged").await;
}

/// Two processes that purge simultaneously delete each record once.
pub(super) async fn simultaneous_purges_delete_each_record_once(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    for n in 0..60 {
        let expiring = Claim { retention: fixture.lease(), ..claim_of(&format!("key {n}")) };
        handles[n % 2].win_and_complete(&expiring, response("r")).await;
    }
    run_out(fixture).await;
    let tasks = handles.clone().map(|store| async move {
        let mut deleted = 0;
        for _ in 0..1000 {
            deleted += store.purge(7).await;
            if store.list(RecordFilter::All, 1).await.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        deleted
    });
    let deleted: u64 = at_once(tasks).await.into_iter().sum();
    assert_eq!(deleted, 60, "records that two simultaneous purges say they have deleted, of 60");
}

/// A purge never deletes a record that was claimed again meanwhile.
pub(super) async fn a_purge_spares_what_is_claimed_meanwhile(fixture: &dyn Fixture) {
    let [store, purger] = two_handles(fixture).await;
    for round in 0..3 {
        let olds =
            expired(fixture, &store, round, Claim { retention: fixture.lease(), ..claim_of("k") }).await;
        let purge = spawn_purge(purger.clone());
        let claims = olds.into_iter().map(|old| {
            let store = store.clone();
            async move {
                let new = Claim { retention: LONG, lease: LONG, ..retry_of(&old) };
                // The purge may have the record locked at this moment.
                while let ClaimOutcome::Contended = store.claim(&new).await {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                new
            }
        });
        let claimed = at_once(claims).await;
        finished(purge).await;
        for new in claimed {
            let record = store.get(&new, "claimed again while a purge ran").await;
            assert_eq!(record.attempt, Some(new.attempt.id), "attempt of a record claimed again");
        }
    }
}

/// A purge never deletes a record whose owner has renewed its lease meanwhile.
pub(super) async fn a_purge_spares_what_is_renewed_meanwhile(fixture: &dyn Fixture) {
    let [store, purger] = two_handles(fixture).await;
    let olds = expired(
        fixture,
        &store,
        0,
        Claim { retention: fixture.lease(), lease: fixture.lease(), ..claim_of("k") },
    )
    .await;
    let purge = spawn_purge(purger);
    let renewals = olds.into_iter().map(|old| {
        let store = store.clone();
        async move {
            let renewed = store.renew_one(&old.attempt, LONG).await == RenewOutcome::Renewed;
            (old, renewed)
        }
    });
    let outcomes = at_once(renewals).await;
    finished(purge).await;
    for (owner, _) in outcomes.into_iter().filter(|(_, renewed)| *renewed) {
        let record = store.get(&owner, "its lease was renewed while a purge ran").await;
        assert_eq!(record.attempt, Some(owner.attempt.id), "attempt of a record that was renewed");
    }
}

/// Makes forty expired records. They are completed unless their lease shall run out as well.
async fn expired(fixture: &dyn Fixture, store: &Handle, round: usize, like: Claim) -> Vec<Claim> {
    let claims = (0..40).map(|n| {
        let attempt = claim_of(&format!("round {round}, key {n}")).attempt;
        Claim { attempt, record_id: crate::stored::record::RecordId::random(), ..like.clone() }
    });
    let claims: Vec<Claim> = claims.collect();
    for claim in &claims {
        store.win(claim, "first claim").await;
        if like.lease == LONG {
            store.complete_as_owner(&claim.attempt, response("old"), "by the owner").await;
        }
    }
    run_out(fixture).await;
    claims
}

fn spawn_purge(purger: Handle) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        for _ in 0..30 {
            purger.purge(5).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
}
