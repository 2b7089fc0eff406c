//! Rules about completed records, which do not change.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, RenewOutcome, Resolution, ResolveOutcome};

/// A claim by any attempt that finds a completed record shows its response.
pub(super) async fn a_completed_record_is_shown_to_every_retry(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win_and_complete(&owner, response("r")).await;
    for store in [&store, &other] {
        let shown = store.be_refused(&retry_of(&owner), "the record is completed").await;
        assert_eq!(response_of(&shown), "r", "response shown to a retry");
        assert_eq!(shown.attempt, Some(owner.attempt.id), "the attempt that has completed the record");
        assert_eq!(shown, store.get(&owner, "the record is completed").await, "a claim and get() differ");
    }
}

/// A replay does not change the record.
pub(super) async fn a_replay_writes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win_and_complete(&owner, response("r")).await;
    let before = store.get(&owner, "before the replays").await;
    for _ in 0..20 {
        let eager = Claim { lease: LONG * 9, retention: LONG * 9, max_abandoned: 1, ..retry_of(&owner) };
        store.be_refused(&eager, "the record is completed").await;
        other.be_refused(&other_request(&owner), "the record is completed").await;
    }
    run_out(fixture).await;
    store.be_refused(&retry_of(&owner), "the record is completed and its lease is long over").await;
    assert_eq!(store.get(&owner, "after the replays").await, before, "a replay changed the record");
}

/// A completed record stays as it is, whatever call is tried on it.
pub(super) async fn a_completed_record_never_changes(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = claim_of("k");
    store.win_and_complete(&owner, response("r")).await;
    let before = store.get(&owner, "after the completion").await;

    assert_eq!(store.renew_one(&owner.attempt, LONG * 9).await, RenewOutcome::Lost, "renewal by its attempt");
    for resolution in [Resolution::Release, Resolution::Complete(response("other"))] {
        let outcome = store.resolve(&owner, resolution).await;
        assert_eq!(outcome, ResolveOutcome::AlreadyCompleted, "resolving a completed record");
    }
    store.complete_as_owner(&owner.attempt, response("other"), "repeated by its attempt").await;
    store.lose_completion(&retry_of(&owner).attempt, "by another attempt").await;
    store.purge(100).await;
    assert_eq!(store.get(&owner, "afterwards").await, before, "a completed record changed");
}

/// Retries during a completion see the record in progress or completed, never in between.
pub(super) async fn retries_during_a_completion_see_all_of_it_or_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let body = bytes::Bytes::from(vec![7; 100_000]);
    for round in 0..5 {
        let owner = claim_of(&format!("round {round}"));
        store.win(&owner, "first claim").await;
        let completion = {
            let (store, attempt, body) = (store.clone(), owner.attempt.clone(), body.clone());
            async move { store.complete_as_owner(&attempt, body, "by the owner").await }
        };
        let retries = {
            let (other, owner, body) = (other.clone(), owner.clone(), body.clone());
            async move {
                loop {
                    match other.claim(&retry_of(&owner)).await {
                        crate::stored::record::ClaimOutcome::Exists(record) => match record.state {
                            crate::stored::record::RecordState::InProgress { .. } => {
                                tokio::task::yield_now().await
                            }
                            crate::stored::record::RecordState::Completed { response } => {
                                break assert!(response == body, "half a response");
                            }
                            crate::stored::record::RecordState::Held => {
                                panic!("a record that no attempt held is held")
                            }
                        },
                        crate::stored::record::ClaimOutcome::Contended => tokio::task::yield_now().await,
                        won @ crate::stored::record::ClaimOutcome::Won { .. } => {
                            panic!("the owner's lease is alive: {won:?}")
                        }
                    }
                }
            }
        };
        let completion: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(completion);
        at_once([completion, Box::pin(retries)]).await;
    }
}
