//! Rules about the calls of operators.

use std::time::Duration;

use super::{Fixture, support::*};
use crate::stored::record::{
    Claim, CompleteOutcome, Fenced, RecordFilter, RecordState, Resolution, ResolveOutcome,
};

/// A look-up of a key without a record finds none.
pub(super) async fn an_absent_key_is_not_found(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    store.win(&claim_of("k"), "first claim").await;
    assert!(store.find(&claim_of("another")).await.is_none(), "a record of a key that was never claimed");
    assert!(store.find(&claim_of("K")).await.is_none(), "a record of a key in another case");
}

/// An expired record is still found until it is purged.
pub(super) async fn an_expired_record_is_found_until_it_is_purged(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let claim = Claim { retention: fixture.lease(), ..claim_of("k") };
    store.win_and_complete(&claim, response("r")).await;
    let before = store.get(&claim, "before the expiry").await;
    run_out(fixture).await;
    assert_eq!(store.get(&claim, "after the expiry").await, before, "the expired record");
    assert_eq!(store.purge(1).await, 1, "purged records");
    assert!(store.find(&claim).await.is_none(), "a purged record is found");
}

/// A list shows the records of one state. Lapsed records are in progress; those that the next claim
/// would find held are held.
pub(super) async fn a_list_is_filtered_by_state(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    store.win(&claim_of("alive"), "first claim").await;
    store.win(&Claim { lease: fixture.lease(), ..claim_of("lapsed") }, "first claim").await;
    store.win_and_hold(&claim_of("held")).await;
    store
        .win(&Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("to be held") }, "first claim")
        .await;
    store.win_and_complete(&claim_of("completed"), response("r")).await;
    run_out(fixture).await;

    let lists: [(RecordFilter, &[&str]); 4] = [
        (RecordFilter::InProgress, &["alive", "lapsed"]),
        (RecordFilter::Held, &["held", "to be held"]),
        (RecordFilter::Completed, &["completed"]),
        (RecordFilter::All, &["alive", "completed", "held", "lapsed", "to be held"]),
    ];
    for (filter, keys) in lists {
        let mut listed = store.keys_listed(filter, 100).await;
        listed.sort();
        assert_eq!(listed, keys, "records listed as {filter:?}");
    }
}

/// A list begins with the oldest record and ends at its limit.
pub(super) async fn a_list_begins_with_the_oldest(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    for key in ["m", "a", "z", "B", "k"] {
        store.win(&Claim { retention: LONG, ..claim_of(key) }, "first claim").await;
        // The times of creation must differ on the clock of any store.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let first = claim_of("a");
    let renewed = store.be_refused(&first, "taken").await;
    assert_eq!(renewed.key, first.attempt.key, "the record shown");
    for (limit, keys) in [(0, &[][..]), (1, &["m"]), (3, &["m", "a", "z"]), (100, &["m", "a", "z", "B", "k"])]
    {
        assert_eq!(store.keys_listed(RecordFilter::All, limit).await, keys, "the oldest {limit}");
        assert_eq!(
            store.keys_listed(RecordFilter::InProgress, limit).await,
            keys,
            "the oldest {limit} in progress"
        );
    }
}

/// A list shows everything about a record that `get` shows.
pub(super) async fn a_list_shows_what_get_shows(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let completed = claim_of("completed");
    store.win_and_complete(&completed, response("r")).await;
    let held = claim_of("held");
    store.win_and_hold(&held).await;
    for (claim, filter) in [(completed, RecordFilter::Completed), (held, RecordFilter::Held)] {
        let shown = store.get(&claim, "after it was made").await;
        assert_eq!(store.list(filter, 10).await, [shown], "records listed as {filter:?}");
    }
}

/// An evicted key is absent, whatever state its record was in.
pub(super) async fn an_evicted_key_is_absent(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let [alive, held, completed, bystander] = ["alive", "held", "completed", "bystander"].map(claim_of);
    assert!(!store.evict(&alive).await, "an absent key was evicted");
    store.win(&alive, "first claim").await;
    store.win_and_hold(&held).await;
    store.win_and_complete(&completed, response("r")).await;
    store.win(&bystander, "first claim").await;

    for claim in [&alive, &held, &completed] {
        let key = claim.attempt.key.as_str();
        assert!(other.evict(claim).await, "{key}: evict says that there was no record");
        assert!(store.find(claim).await.is_none(), "{key}: an evicted record is found");
        assert!(!other.evict(claim).await, "{key}: evicted twice");
        let new = other_request(claim);
        assert_eq!(store.win(&new, "after the eviction").await, (new.record_id, 1), "{key}: id and number");
    }
    assert!(store.find(&bystander).await.is_some(), "evicting one key evicted another");
}

/// An operator can release held and lapsed records.
pub(super) async fn an_operator_gives_a_key_back(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    for owner in unknown_outcomes(fixture, &store).await {
        let key = owner.attempt.key.as_str();
        let outcome = store.resolve(&owner, Resolution::Release).await;
        assert_eq!(outcome, ResolveOutcome::Resolved, "{key}: release by an operator");
        match store.complete(&owner.attempt, response("late")).await {
            CompleteOutcome::Absent => {}
            other => panic!("{key}: the attempt's completion after the release was {other:?}"),
        }
        let new = other_request(&owner);
        assert_eq!(store.win(&new, "after the release").await, (new.record_id, 1), "{key}: id and number");
        store.lose_completion(&owner.attempt, "the key was given back and claimed").await;
    }
}

/// An operator can complete held and lapsed records. That takes the record from its attempt and
/// keeps it for its whole retention again.
pub(super) async fn an_operator_completes_a_record(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    for owner in unknown_outcomes(fixture, &store).await {
        let key = owner.attempt.key.as_str();
        let before = store.get(&owner, key).await;
        let outcome = other.resolve(&owner, Resolution::Complete(response("resolved"))).await;
        assert_eq!(outcome, ResolveOutcome::Resolved, "{key}: completion by an operator");

        let record = store.be_refused(&retry_of(&owner), "resolved").await;
        assert_eq!(response_of(&record), "resolved", "{key}: response after it was resolved");
        assert_eq!(record.attempt, None, "{key}: attempt of a record that an operator completed");
        assert_eq!(
            (record.id, record.created_at),
            (before.id, before.created_at),
            "{key}: id and time of making"
        );
        let anew = record.expires_at.duration_since(before.expires_at).unwrap_or_default();
        assert!(anew > fixture.lease(), "{key}: the expiry moved by {anew:?} only");

        store.lose_completion(&owner.attempt, "an operator has completed the record").await;
        assert_eq!(store.release(&owner.attempt).await, Fenced::Lost, "{key}: release by the attempt");
        let after = store.get(&owner, key).await;
        assert_eq!(after, record, "{key}: the record after its attempt's late writes");
        let outcome = store.resolve(&owner, Resolution::Release).await;
        assert_eq!(outcome, ResolveOutcome::AlreadyCompleted, "{key}: resolved twice");
    }
}

/// A record that an operator completes past its expiry is kept for its whole retention again.
pub(super) async fn a_record_resolved_past_its_expiry_is_kept_anew(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { retention: fixture.lease() * 2, ..claim_of("k") };
    store.win_and_hold(&owner).await;
    run_out(fixture).await;
    run_out(fixture).await;
    let outcome = store.resolve(&owner, Resolution::Complete(response("resolved"))).await;
    assert_eq!(outcome, ResolveOutcome::Resolved, "completion by an operator");
    let shown = store.be_refused(&retry_of(&owner), "just resolved, past its first expiry").await;
    assert_eq!(response_of(&shown), "resolved", "response after it was resolved");
    assert_eq!(store.purge(100).await, 0, "a record that was just resolved was purged");

    run_out(fixture).await;
    run_out(fixture).await;
    assert_eq!(store.purge(100).await, 1, "purged records after the whole retention again");
}

/// A record that is absent, completed or has a live lease cannot be resolved.
pub(super) async fn only_unknown_outcomes_are_resolved(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let [alive, completed, absent] = ["alive", "completed", "absent"].map(claim_of);
    store.win(&alive, "first claim").await;
    store.win_and_complete(&completed, response("r")).await;
    for resolution in [Resolution::Release, Resolution::Complete(response("resolved"))] {
        let outcome = store.resolve(&alive, resolution.clone()).await;
        assert_eq!(outcome, ResolveOutcome::InProgress, "resolving a record with a live lease");
        let outcome = store.resolve(&completed, resolution.clone()).await;
        assert_eq!(outcome, ResolveOutcome::AlreadyCompleted, "resolving a completed record");
        let outcome = store.resolve(&absent, resolution).await;
        assert_eq!(outcome, ResolveOutcome::Absent, "resolving an absent key");
    }
    assert!(store.find(&absent).await.is_none(), "resolving an absent key made a record");
    assert_eq!(
        response_of(&store.get(&completed, "afterwards").await),
        "r",
        "response of the completed record"
    );
    store.complete_as_owner(&alive.attempt, response("r"), "by the owner").await;
}

/// Of many simultaneous resolutions, exactly one is carried out.
pub(super) async fn of_simultaneous_resolutions_exactly_one_counts(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    for round in 0..5 {
        let owner = claim_of(&format!("round {round}"));
        handles[0].win_and_hold(&owner).await;
        let tasks = (0..8).map(|n| {
            let (store, owner) = (handles[n % 2].clone(), owner.clone());
            async move { store.resolve(&owner, Resolution::Complete(response("resolved"))).await }
        });
        let outcomes = at_once(tasks).await;
        let resolved = outcomes.iter().filter(|outcome| **outcome == ResolveOutcome::Resolved).count();
        assert_eq!(resolved, 1, "resolutions that say they have resolved the record: {outcomes:?}");
    }
}

/// Of a completion by an operator and a simultaneous one by the attempt, exactly one is carried
/// out.
pub(super) async fn a_resolution_and_a_completion_exclude_each_other(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    for round in 0..12 {
        let owner = claim_of(&format!("round {round}"));
        store.win_and_hold(&owner).await;
        let resolution = {
            let (other, owner) = (other.clone(), owner.clone());
            async move { other.resolve(&owner, Resolution::Complete(response("resolved"))).await }
        };
        let completion = {
            let (store, attempt) = (store.clone(), owner.attempt.clone());
            async move {
                matches!(store.complete(&attempt, response("completed")).await, CompleteOutcome::Completed)
            }
        };
        let (outcome, completed) = both_at_once(round, resolution, completion).await;
        let resolved = outcome == ResolveOutcome::Resolved;
        assert!(completed != resolved, "completed: {completed}, resolved: {resolved}");
        let expected = if completed { "completed" } else { "resolved" };
        assert_eq!(response_of(&store.get(&owner, "afterwards").await), expected, "response that is stored");
    }
}

/// Makes records that an operator may resolve: held, lapsed, and one that the next claim would find
/// held.
async fn unknown_outcomes(fixture: &dyn Fixture, store: &Handle) -> [Claim; 3] {
    let claims = [
        claim_of("held"),
        Claim { lease: fixture.lease(), ..claim_of("lapsed") },
        Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("to be held") },
    ];
    for claim in &claims {
        store.win(claim, "first claim").await;
    }
    assert_eq!(store.hold(&claims[0].attempt).await, Fenced::Applied, "the owner could not hold its record");
    run_out(fixture).await;
    let state = store.get(&claims[1], "lapsed").await.state;
    assert!(
        matches!(state, RecordState::InProgress { .. }),
        "a lapsed record that may be taken over is {state:?}"
    );
    claims
}
