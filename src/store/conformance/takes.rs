//! Rules about taking intents that are due, by their names.

use std::time::Duration;

use super::{
    Fixture,
    intents::{finalize, opening_of, owned},
    support::*,
};
use crate::stored::{
    intent::{IntentFence, IntentUpdate, Opening, Overlooked, Place},
    record::{Claim, Fenced},
};

/// Intents are taken for a look-up when they dangle and no attempt can be calling any more. Each is
/// taken for a while only.
pub(super) async fn intents_are_taken_once_they_are_due_and_their_attempt_has_ended(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let due = opening_of(&claim, "due");
    recovery.must_open(&due, "a new intent").await;
    let later = Opening { dangling_after: LONG, ..opening_of(&claim, "later") };
    recovery.must_open(&later, "a new intent").await;
    fall_due().await;
    assert_eq!(recovery.take().await, [], "intents that are taken from their owner");
    assert_eq!(recovery.store.release(&claim.attempt).await, Fenced::Applied, "release by the owner");
    let taken = recovery.take_one("its attempt has ended").await;
    assert_eq!((taken.upstream_key, taken.looks), (due.upstream_key, 1), "what is taken");
    assert!(taken.dangling, "what is taken dangles");
    assert_eq!(recovery.take().await, [], "intents that are taken a second time");
    recovery
        .must_update(due.upstream_key, taken.lookup_fence(), IntentUpdate::Absent(Some(Duration::ZERO)))
        .await;
    fall_due().await;
    let last = recovery.take_one("it must be looked up a last time").await;
    recovery.must_update(due.upstream_key, last.lookup_fence(), IntentUpdate::Close).await;
    fall_due().await;
    assert_eq!(recovery.take().await, [], "intents that are taken when all is known");
}

/// Only intents with the given names are taken, at the first look-up, at the confirmation and at
/// the last one. The others are left as they are, whatever their names have in common.
pub(super) async fn only_intents_with_the_given_names_are_taken(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let names = ["a", "A", "a ", "a%", "b\"'\\", "é"];
    for name in names {
        recovery.must_open(&opening_of(&claim, name), "a new intent").await;
    }
    assert_eq!(recovery.store.release(&claim.attempt).await, Fenced::Applied, "release by the owner");
    fall_due().await;
    assert_eq!(recovery.take_named(&[], 100).await, [], "intents that are taken without a name");
    assert_eq!(recovery.take_named(&["other", "%", "_", "a_"], 100).await, [], "intents of other names");
    for name in names {
        for update in [
            IntentUpdate::LookAgain { after: Duration::ZERO, absences: 1 },
            IntentUpdate::Absent(Some(Duration::ZERO)),
            IntentUpdate::Close,
        ] {
            let mut taken = recovery.take_named(&["other", name], 100).await;
            assert_eq!(taken.len(), 1, "intents with the name {name}: {taken:?}");
            let seen = taken.remove(0);
            assert_eq!(seen.name, name, "what is taken");
            recovery.must_update(seen.upstream_key, seen.lookup_fence(), update).await;
            fall_due().await;
        }
    }
}

/// Intents whose look-up is overdue are counted by name, unless their name is given. At most the
/// limit is counted.
pub(super) async fn overlooked_intents_are_counted_by_name(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = Claim { retention: LONG, ..claim_of("k") };
    recovery.store.win(&claim, "first claim").await;
    let overlooked = async |overdue, limit| {
        let counted = recovery.inner.count_overlooked(&owned(&["a", "b"]), overdue, limit).await;
        expected(counted, "count_overlooked")
    };
    for n in 0..3 {
        for name in ["a", "c"] {
            let place = Place::Discriminator(n.to_string());
            let mut opening = Opening::new(claim.attempt.clone(), claim.record_id, name.to_owned(), &place);
            opening.dangling_after = Duration::from_millis(1);
            recovery.must_open(&opening, "a new intent").await;
        }
    }
    for (name, update) in [("d", finalize()), ("e", IntentUpdate::Absent(Some(Duration::ZERO)))] {
        let opening = opening_of(&claim, name);
        recovery.must_open(&opening, "a new intent").await;
        recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), update).await;
    }
    recovery.must_open(&opening_of(&claim, "z"), "a new intent").await;
    fall_due().await;
    assert_eq!(overlooked(Duration::ZERO, 100).await, [], "their attempt owns the record");
    assert_eq!(recovery.store.release(&claim.attempt).await, Fenced::Applied, "release by the owner");
    let counts = [Overlooked::new("c", 3), Overlooked::new("z", 1)];
    assert_eq!(overlooked(Duration::ZERO, 100).await, counts, "overdue intents");
    assert_eq!(overlooked(LONG, 100).await, [], "intents that are not overdue for so long");
    let some: u64 = overlooked(Duration::ZERO, 2).await.iter().map(|counted| counted.intents).sum();
    assert_eq!(some, 2, "overdue intents, with a limit");
    recovery.take_named(&["c"], 2).await;
    let counts = [Overlooked::new("c", 1), Overlooked::new("z", 1)];
    assert_eq!(overlooked(Duration::ZERO, 100).await, counts, "overdue intents that are not taken");
}

/// Calls that take intents simultaneously share them: no two calls get the same intent.
pub(super) async fn an_intent_is_taken_by_one_at_a_time(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    for n in 0..60 {
        let mut opening = Opening::new(
            claim.attempt.clone(),
            claim.record_id,
            "a".to_owned(),
            &Place::Discriminator(n.to_string()),
        );
        opening.dangling_after = Duration::from_millis(1);
        recovery.must_open(&opening, "a new intent").await;
    }
    recovery.store.release(&claim.attempt).await;
    fall_due().await;
    let tasks = (0..6).map(|_| {
        let recovery = recovery.clone();
        async move {
            let mut taken = Vec::new();
            for _ in 0..12 {
                taken.extend(recovery.take_named(&["a"], 5).await);
            }
            taken
        }
    });
    let mut taken: Vec<_> = at_once(tasks).await.into_iter().flatten().collect();
    assert!(taken.iter().all(|intent| intent.looks == 1), "an intent was taken twice");
    assert_eq!(taken.len(), 60, "intents that were taken, of 60");
    taken.sort_by_key(|intent| intent.upstream_key.as_uuid());
    taken.dedup_by_key(|intent| intent.upstream_key);
    assert_eq!(taken.len(), 60, "different intents that were taken, of 60");
}
