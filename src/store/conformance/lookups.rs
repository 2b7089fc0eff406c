//! Rules about intents and their records, look-ups, operators and the purge.

use std::time::Duration;

use super::{
    Fixture,
    intents::{finalize, next_call, opening_of},
    support::*,
};
use crate::stored::{
    intent::{Intent, IntentFence, IntentFilter, IntentState, IntentUpdate, OpenOutcome, Opening},
    record::{Claim, ClaimOutcome, Fenced, RecordId, RecordState, RenewOutcome, Resolution, ResolveOutcome},
};

impl Recovery {
    /// Makes a record with an open intent, whose attempt has let its lease run out.
    async fn abandoned(
        &self,
        fixture: &dyn Fixture,
        key: &str,
        repeatable_for: Duration,
    ) -> (Claim, Opening) {
        let claim = Claim { lease: fixture.lease(), max_abandoned: 100, ..claim_of(key) };
        self.store.win(&claim, "first claim").await;
        let opening = Opening { repeatable_for, ..opening_of(&claim, "a") };
        self.must_open(&opening, "a new intent").await;
        run_out(fixture).await;
        (claim, opening)
    }

    /// Makes a call, which succeeds.
    async fn call(&self, claim: &Claim) {
        let opening = opening_of(claim, "a");
        self.must_open(&opening, "a new intent").await;
        self.must_update(opening.upstream_key, IntentFence::Call(opening.call), finalize()).await;
    }

    /// Takes the one intent that is due.
    pub(super) async fn take_one(&self, why: &str) -> Intent {
        let mut taken = self.take().await;
        assert_eq!(taken.len(), 1, "{why}: intents that are due");
        taken.remove(0)
    }

    async fn listed(&self, filter: IntentFilter) -> Vec<String> {
        let intents = expected(self.inner.list_intents(filter, 100).await, "list_intents");
        intents.into_iter().map(|intent| intent.name).collect()
    }
}

/// The result of a look-up is recorded unless the intent was called again, settled or taken again
/// meanwhile.
pub(super) async fn an_update_of_a_lookup_is_fenced_by_all_that_was_seen(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let (claim, opening) = recovery.abandoned(fixture, "k", LONG).await;
    let key = opening.upstream_key;
    let taken_again =
        |seen: &Intent| IntentFence::Lookup { call: seen.call, takes: seen.takes - 1, open: true };
    let seen = recovery.take_one("it dangles").await;
    assert_eq!(recovery.update(key, taken_again(&seen), finalize()).await, Fenced::Lost, "fewer look-ups");
    let again = IntentUpdate::LookAgain { after: Duration::ZERO, absences: 1 };
    recovery.must_update(key, seen.lookup_fence(), again).await;
    assert_eq!(recovery.get(key).await.absences, 1, "how often it was not found");
    fall_due().await;
    let next = recovery.take_one("it must be looked up again").await;
    assert_eq!((next.looks, next.absences), (2, 1), "look-ups, and how often it was not found");
    assert_eq!(recovery.update(key, seen.lookup_fence(), finalize()).await, Fenced::Lost, "taken again");

    let retry = Claim { lease: LONG, ..retry_of(&claim) };
    recovery.store.win(&retry, "its intent may be called again").await;
    let call = Opening { attempt: retry.attempt.clone(), ..next_call(&opening) };
    recovery.must_open(&call, "the upstream deduplicates").await;
    let absent = IntentUpdate::Absent(None);
    assert_eq!(recovery.update(key, next.lookup_fence(), absent).await, Fenced::Lost, "called again");
    recovery.must_update(key, IntentFence::Call(call.call), IntentUpdate::Absent(None)).await;
    let found = IntentFence::Lookup { call: call.call, takes: 0, open: true };
    assert_eq!(recovery.update(key, found, finalize()).await, Fenced::Lost, "it is not open any more");
    let found = IntentFence::Lookup { call: call.call, takes: 0, open: false };
    recovery.must_update(key, found, finalize()).await;
}

/// After an operator has asked for another look-up, the result of an earlier one is not recorded.
pub(super) async fn an_operator_makes_no_earlier_lookup_count_again(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let (_, opening) = recovery.abandoned(fixture, "k", Duration::ZERO).await;
    let key = opening.upstream_key;
    let late = recovery.take_one("it dangles").await;
    let again = IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 };
    recovery.must_update(key, IntentFence::Operator, again).await;
    fall_due().await;
    let next = recovery.take_one("an operator wants it looked up").await;
    assert_eq!(next.looks, 1, "look-ups since an operator wanted them");
    let absent = || IntentUpdate::Absent(None);
    assert_eq!(recovery.update(key, late.lookup_fence(), absent()).await, Fenced::Lost, "an earlier look-up");
    recovery.must_update(key, next.lookup_fence(), absent()).await;
}

/// A record with intents is not forgotten when a lease that outlives its expiry runs out.
pub(super) async fn a_lease_that_outlives_the_expiry_keeps_a_record_with_intents(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    // Three waits end before the expiry. The renewed lease ends after it.
    let claims = ["called before", "called after"]
        .map(|key| Claim { retention: fixture.lease() * 9 / 2, ..claim_of(key) });
    let [before, after] = &claims;
    for claim in &claims {
        recovery.store.win(claim, "first claim").await;
    }
    recovery.call(before).await;
    for _ in 0..3 {
        run_out(fixture).await;
    }
    for claim in &claims {
        let renewed = recovery.store.renew_one(&claim.attempt, fixture.lease()).await;
        assert_eq!(renewed, RenewOutcome::Renewed, "renewal by the owner");
    }
    recovery.call(after).await;
    run_out(fixture).await;
    for claim in &claims {
        let won = recovery.store.win(&retry_of(claim), "the lease is over").await;
        assert_eq!(won, (claim.record_id, 2), "id and number of the takeover");
    }
}

/// An operator settles an intent only if no attempt with a live lease may be calling. A finalized
/// intent is never changed.
pub(super) async fn an_operator_spares_calls_under_way_and_finalized_intents(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = Claim { lease: fixture.lease(), ..claim_of("k") };
    recovery.store.win(&claim, "first claim").await;
    let opening = opening_of(&claim, "a");
    let key = opening.upstream_key;
    recovery.must_open(&opening, "a new intent").await;
    let by_hand = |update| recovery.update(key, IntentFence::Operator, update);
    assert_eq!(by_hand(finalize()).await, Fenced::Lost, "its attempt may be calling");
    assert_eq!(recovery.update(key, IntentFence::Attention, IntentUpdate::Close).await, Fenced::Lost, "open");
    run_out(fixture).await;
    recovery.take_one("it dangles").await;
    let again = || IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 };
    assert_eq!(by_hand(again()).await, Fenced::Applied, "to be looked up again");
    fall_due().await;
    assert_eq!(recovery.take_one("it must be looked up").await.looks, 1, "look-ups since");
    assert_eq!(by_hand(IntentUpdate::Refuse("no".to_owned())).await, Fenced::Applied, "refused");
    assert_eq!(by_hand(again()).await, Fenced::Lost, "a refused one is not looked up");
    assert_eq!(by_hand(finalize()).await, Fenced::Applied, "finalized");
    for update in [IntentUpdate::Absent(None), IntentUpdate::Refuse("no".to_owned()), again()] {
        assert_eq!(by_hand(update).await, Fenced::Lost, "it is finalized");
    }
}

/// A lapsed record is held as long as one of its open intents may not be called again. Once that is
/// settled, the record is claimable without any other call.
pub(super) async fn a_lapsed_record_with_an_open_intent_is_held_until_that_is_settled(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for (key, update) in [("found", finalize()), ("absent", IntentUpdate::Absent(None))] {
        let (claim, opening) = recovery.abandoned(fixture, key, Duration::ZERO).await;
        let retry = retry_of(&claim);
        let found = recovery.store.be_refused(&retry, "the outcome of a call is unknown").await;
        assert_eq!((found.state, found.unresolved), (RecordState::Held, 1), "what a claim is shown");
        let shown = recovery.store.get(&claim, "it is held").await;
        assert_eq!((shown.state, shown.attempt_number), (RecordState::Held, 1), "what get shows");
        let released = recovery.store.resolve(&claim, Resolution::Release).await;
        assert_eq!(released, ResolveOutcome::UnresolvedIntents, "release by an operator");
        recovery.must_update(opening.upstream_key, IntentFence::Operator, update).await;
        let won = recovery.store.win(&retry, "its intent is settled").await;
        assert_eq!(won, (claim.record_id, 2), "the same record, the next attempt");
    }
}

/// An open intent that may be called again does not prevent a takeover. One that may not be called
/// again does.
pub(super) async fn a_lapsed_record_whose_intents_may_be_called_again_is_taken_over(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let (claim, _) = recovery.abandoned(fixture, "deduplicated", LONG).await;
    assert_eq!(recovery.store.win(&retry_of(&claim), "it may be called again").await.1, 2);

    let claim = Claim { lease: fixture.lease(), ..claim_of("not sent") };
    recovery.store.win(&claim, "first claim").await;
    let opening = opening_of(&claim, "a");
    recovery.must_open(&opening, "a new intent").await;
    recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), IntentUpdate::NotSent).await;
    let (for_a_while, other) = recovery.abandoned(fixture, "for a while", fixture.lease() * 3).await;
    assert_eq!(recovery.store.win(&retry_of(&claim), "its call was not sent").await.1, 2);

    recovery.must_lose(&next_call(&other), "its lease has run out").await;
    tokio::time::sleep(fixture.lease() * 3).await;
    let found =
        recovery.store.be_refused(&retry_of(&for_a_while), "the upstream may have forgotten it").await;
    assert_eq!(found.state, RecordState::Held, "what a claim is shown");
}

/// A released record with an intent stays, with its intents. Its attempt does not count as
/// abandoned.
pub(super) async fn a_released_record_with_an_intent_goes_on(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = Claim { max_abandoned: 1, ..claim_of("k") };
    recovery.store.win(&claim, "first claim").await;
    let opening = opening_of(&claim, "a");
    recovery.must_open(&opening, "a new intent").await;
    recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), finalize()).await;
    assert_eq!(recovery.store.release(&claim.attempt).await, Fenced::Applied, "release by the owner");
    recovery.store.be_refused(&other_request(&claim), "the record keeps its fingerprint").await;
    let retry = retry_of(&claim);
    assert_eq!(recovery.store.win(&retry, "it was released").await, (claim.record_id, 2), "id and number");
    assert_eq!(recovery.store.get(&retry, "it was released").await.abandoned, 0, "abandoned attempts");
    let mut shown = opening_of(&retry, "a");
    (shown.record_id, shown.upstream_key) = (claim.record_id, opening.upstream_key);
    assert!(
        matches!(recovery.open(&shown).await, OpenOutcome::Recorded(intent)
        if matches!(intent.state, IntentState::Finalized(_))),
        "the outcome of the first attempt"
    );
}

/// An owner opens an intent at the end of its lease, and another attempt takes the record over: at
/// most one succeeds.
pub(super) async fn an_opening_and_a_takeover_exclude_each_other(fixture: &dyn Fixture) {
    let Some(owner) = Recovery::of(fixture).await else { return };
    let Some(taker) = Recovery::of(fixture).await else { return };
    let lease = fixture.lease() / 8;
    let (mut opened, mut taken) = (0, 0);
    for group in 0..10_u32 {
        let rounds = (0..20_u32).map(|n| {
            let (owner, taker) = (owner.clone(), taker.clone());
            let claim = Claim { lease, ..claim_of(&format!("k {group} {n}")) };
            async move {
                owner.store.win(&claim, "first claim").await;
                // The rounds are spread over two leases, so that some races fall on the end of the
                // lease.
                tokio::time::sleep(lease * 2 * n / 20).await;
                let (opening, retry) = (opening_of(&claim, "a"), retry_of(&claim));
                let open = {
                    let (owner, opening) = (owner.clone(), opening.clone());
                    async move { owner.open(&opening).await }
                };
                let take = {
                    let (taker, retry) = (taker.clone(), retry.clone());
                    async move { taker.store.claim(&retry).await }
                };
                let (opened, taken) = both_at_once(n as usize, open, take).await;
                let (opened, taken) =
                    (matches!(opened, OpenOutcome::Opened), matches!(taken, ClaimOutcome::Won { .. }));
                assert!(!(opened && taken), "an intent was opened and its record taken over");
                tokio::time::sleep(lease).await;
                if opened {
                    let found = taker.store.be_refused(&retry, "an intent is open").await;
                    assert_eq!(found.unresolved, 1, "open intents");
                }
                if taken {
                    owner.must_lose(&opening, "the record was taken over").await;
                }
                (opened, taken)
            }
        });
        for (opens, takes) in at_once(rounds).await {
            opened += u32::from(opens);
            taken += u32::from(takes);
        }
    }
    assert!(opened > 0 && taken > 0, "{opened} openings and {taken} takeovers, of 200 races, succeed");
}

/// A purge spares a record, even a completed one, until its intents are settled. A record that is
/// not completed is then kept for its whole retention again. So is a record that its attempt
/// releases past its expiry.
pub(super) async fn a_purge_spares_records_with_open_intents(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let mut keys = Vec::new();
    for (key, repeatable_for) in [("once", Duration::ZERO), ("deduplicated", LONG)] {
        let claim = Claim { lease: fixture.lease(), retention: fixture.lease(), ..claim_of(key) };
        recovery.store.win(&claim, "first claim").await;
        let opening = Opening { repeatable_for, ..opening_of(&claim, "a") };
        recovery.must_open(&opening, "a new intent").await;
        keys.push(opening.upstream_key);
    }
    let completed = Claim { retention: fixture.lease(), ..claim_of("completed") };
    recovery.store.win(&completed, "first claim").await;
    let open = opening_of(&completed, "a");
    recovery.must_open(&open, "a new intent").await;
    recovery.store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    let late = Claim { retention: fixture.lease(), ..claim_of("late") };
    recovery.store.win(&late, "first claim").await;
    let settled = opening_of(&late, "a");
    recovery.must_open(&settled, "a new intent").await;
    recovery.must_update(settled.upstream_key, IntentFence::Call(settled.call), finalize()).await;
    run_out(fixture).await;
    assert_eq!(recovery.store.purge(100).await, 0, "purged records with open intents");
    for key in keys {
        recovery.must_update(key, IntentFence::Operator, finalize()).await;
    }
    assert_eq!(recovery.store.release(&late.attempt).await, Fenced::Applied, "release by the owner");
    assert_eq!(recovery.store.purge(100).await, 0, "purged records in the moment in which they are freed");
    recovery.must_update(open.upstream_key, IntentFence::Operator, finalize()).await;
    run_out(fixture).await;
    assert_eq!(recovery.store.purge(100).await, 4, "purged records whose intents are settled");
}

/// An intent of an evicted record is settled alone. It does not touch the record that has the key
/// now.
pub(super) async fn an_intent_is_settled_after_its_record_has_gone(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let (old, opening) = recovery.abandoned(fixture, "k", Duration::ZERO).await;
    assert!(recovery.store.evict(&old).await, "there was a record to evict");
    let new = Claim { lease: LONG, ..retry_of(&old) };
    recovery.store.win(&new, "it was evicted").await;
    recovery.must_open(&opening_of(&new, "a"), "a new intent").await;
    let seen = recovery.take_one("its record has gone").await;
    assert_eq!(seen.upstream_key, opening.upstream_key, "what is due");
    recovery.must_update(opening.upstream_key, seen.lookup_fence(), finalize()).await;
    assert_eq!(recovery.store.get(&new, "it is in progress").await.unresolved, 1, "open intents");
}

/// An operator sees which intents are open, dangle, need attention or are dead, and counts of the
/// first three.
pub(super) async fn intents_are_listed_and_counted_by_what_they_wait_for(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    for name in ["attention", "dangling", "dead", "finalized", "open"] {
        let mut opening = opening_of(&claim, name);
        if name == "open" {
            opening.dangling_after = LONG;
        }
        recovery.must_open(&opening, "a new intent").await;
        let (key, fence) = (opening.upstream_key, IntentFence::Call(opening.call));
        match name {
            "attention" => {
                let update = IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 };
                let updated = recovery.inner.update_intent(key, fence, &update, Some("look at it")).await;
                assert_eq!(expected(updated, "update_intent"), Fenced::Applied, "needs attention");
            }
            "dead" => recovery.must_update(key, fence, IntentUpdate::Refuse("no".to_owned())).await,
            "finalized" => recovery.must_update(key, fence, finalize()).await,
            _ => {}
        }
        fall_due().await;
    }
    assert_eq!(recovery.listed(IntentFilter::Open).await, ["attention", "dangling", "open"]);
    assert_eq!(recovery.listed(IntentFilter::Dangling).await, ["attention", "dangling"]);
    assert_eq!(recovery.listed(IntentFilter::NeedsAttention).await, ["attention"]);
    assert_eq!(recovery.listed(IntentFilter::Dead).await, ["dead"]);
    let of_record = recovery.listed(IntentFilter::OfRecord(claim.record_id)).await;
    assert_eq!(of_record, ["attention", "dangling", "dead", "finalized", "open"]);
    assert!(recovery.listed(IntentFilter::OfRecord(RecordId::random())).await.is_empty(), "another record");
    let counts = expected(recovery.inner.count_intents().await, "count_intents");
    assert_eq!((counts.open, counts.dangling, counts.need_attention), (3, 2, 1), "{counts:?}");
    assert!(counts.oldest.is_some_and(|oldest| oldest >= Duration::from_millis(20)), "{counts:?}");
    recovery.store.release(&claim.attempt).await;
    let taken = recovery.take_one("what needs attention is not looked up").await;
    assert_eq!(taken.name, "dangling", "what is taken");
}

/// Settled intents that are old enough are purged once their record is gone. Open intents never
/// are.
pub(super) async fn settled_intents_are_purged_without_their_record(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let [settled, open] = ["settled", "open"].map(|name| opening_of(&claim, name));
    for opening in [&settled, &open] {
        recovery.must_open(opening, "a new intent").await;
    }
    recovery.must_update(settled.upstream_key, IntentFence::Call(settled.call), finalize()).await;
    run_out(fixture).await;
    assert_eq!(recovery.purge_settled(fixture.lease(), 100).await, 0, "purged intents whose record is there");
    assert!(recovery.store.evict(&claim).await, "there was a record to evict");
    assert_eq!(recovery.purge_settled(LONG, 100).await, 0, "purged intents that are not old enough");
    assert_eq!(
        recovery.purge_settled(fixture.lease(), 100).await,
        1,
        "purged intents, of which one is settled"
    );
    assert!(recovery.find(settled.upstream_key).await.is_none(), "a purged intent");
    assert!(recovery.find(open.upstream_key).await.is_some(), "an open intent");
}
