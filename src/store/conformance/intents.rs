//! Rules about opening intents and recording their outcomes.

use std::time::Duration;

use bytes::Bytes;

use super::{Fixture, support::*};
use crate::stored::{
    intent::{
        CallId, Intent, IntentFence, IntentState, IntentUpdate, OpenOutcome, Opening, Place, Resource,
        UpstreamKey,
    },
    record::{Claim, Fenced, RecordId},
};

impl Recovery {
    pub(super) async fn open(&self, opening: &Opening) -> OpenOutcome {
        expected(self.inner.open_intent(opening).await, "open_intent")
    }

    /// Opens, and must be allowed to call.
    pub(super) async fn must_open(&self, opening: &Opening, why: &str) {
        match self.open(opening).await {
            OpenOutcome::Opened => {}
            other => panic!("{why}: the intent should have been opened and was {other:?}"),
        }
    }

    /// Opens, and must be shown the recorded intent instead of a call.
    async fn must_not_call(&self, opening: &Opening, why: &str) -> Intent {
        match self.open(opening).await {
            OpenOutcome::Recorded(intent) => *intent,
            other => panic!("{why}: the intent should have been shown and was {other:?}"),
        }
    }

    /// Opens, and must be told that the record is not the attempt's.
    pub(super) async fn must_lose(&self, opening: &Opening, why: &str) {
        match self.open(opening).await {
            OpenOutcome::Lost => {}
            other => panic!("{why}: the opening should have been lost and was {other:?}"),
        }
    }

    pub(super) async fn find(&self, intent: UpstreamKey) -> Option<Intent> {
        expected(self.inner.get_intent(intent).await, "get_intent")
    }

    pub(super) async fn get(&self, intent: UpstreamKey) -> Intent {
        self.find(intent).await.unwrap_or_else(|| panic!("the intent is gone"))
    }

    pub(super) async fn update(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: IntentUpdate,
    ) -> Fenced {
        expected(self.inner.update_intent(intent, fence, &update, None).await, "update_intent")
    }

    pub(super) async fn must_update(&self, intent: UpstreamKey, fence: IntentFence, update: IntentUpdate) {
        let shown = format!("{update:?}");
        assert_eq!(self.update(intent, fence, update).await, Fenced::Applied, "{shown} with {fence:?}");
    }

    async fn must_not_update(&self, intent: UpstreamKey, fence: IntentFence, update: IntentUpdate) {
        let (shown, before) = (format!("{update:?}"), self.get(intent).await);
        assert_eq!(self.update(intent, fence, update).await, Fenced::Lost, "{shown} with {fence:?}");
        assert_eq!(self.get(intent).await.state, before.state, "after {shown} with {fence:?}");
    }

    /// Takes the intents of these rules that are due, at most 100, for an hour.
    pub(super) async fn take(&self) -> Vec<Intent> {
        self.take_named(NAMES, 100).await
    }

    pub(super) async fn take_named(&self, names: &[&str], limit: u32) -> Vec<Intent> {
        expected(self.inner.take_dangling(&owned(names), limit, LONG).await, "take_dangling")
    }
}

/// An intent that dangles immediately and whose upstream does not deduplicate. Its call was not
/// made yet.
pub(super) fn opening_of(claim: &Claim, name: &str) -> Opening {
    let mut opening =
        Opening::new(claim.attempt.clone(), claim.record_id, name.to_owned(), &Place::Ordinal(1));
    opening.arguments = Bytes::from_static(b"arguments");
    opening.dangling_after = Duration::from_millis(1);
    opening
}

/// The names of intents that the rules look up.
const NAMES: &[&str] = &["a", "attention", "dangling", "dead", "due", "finalized", "later", "open"];

pub(super) fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Another call of the same intent.
pub(super) fn next_call(opening: &Opening) -> Opening {
    Opening { call: CallId::random(), ..opening.clone() }
}

pub(super) fn resource() -> Resource {
    Resource::new("an id").with_payload("a payload")
}

pub(super) fn finalize() -> IntentUpdate {
    IntentUpdate::Finalize(resource())
}

/// An intent is shown as it was opened, and its record counts it while it is open.
pub(super) async fn an_intent_is_kept_as_it_was_opened(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let mut opening = Opening::new(
        claim.attempt.clone(),
        claim.record_id,
        "näme".to_owned(),
        &Place::Discriminator("' of \\".to_owned()),
    );
    opening.arguments = Bytes::from_static(&[0, 255, b'\'']);
    opening.subject = Some("row 7".to_owned());
    opening.dangling_after = LONG;
    recovery.must_open(&opening, "a new intent").await;
    let intent = recovery.get(opening.upstream_key).await;
    assert!(intent.settled_at.is_none() && intent.created_at <= intent.opened_at, "{intent:?}");
    assert_eq!((intent.record_id, &intent.consumer), (claim.record_id, &claim.attempt.consumer));
    assert_eq!((&intent.key, &*intent.name), (&claim.attempt.key, "näme"));
    assert_eq!((intent.discriminator.as_deref(), intent.ordinal), (Some("' of \\"), 0));
    assert_eq!((&intent.arguments, &intent.subject), (&opening.arguments, &opening.subject));
    assert_eq!((intent.attempt, intent.call, intent.calls), (claim.attempt.id, opening.call, 1));
    assert_eq!((intent.state, intent.dangling), (IntentState::Open { sent: true }, false));
    assert_eq!((intent.looks, intent.absences, intent.attention), (0, 0, None));
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 1, "open intents");
    recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), finalize()).await;
    let intent = recovery.get(opening.upstream_key).await;
    assert_eq!((intent.state, intent.settled_at.is_some()), (IntentState::Finalized(resource()), true));
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 0, "open intents");
}

/// An opening by the same call is opened again, because the reply to the first may have been lost.
pub(super) async fn a_repeated_opening_by_the_same_call_is_opened_again(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let opening = opening_of(&claim, "a");
    for time in ["first", "second"] {
        recovery.must_open(&opening, time).await;
    }
    assert_eq!(recovery.get(opening.upstream_key).await.calls, 1, "calls");
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 1, "open intents");
}

/// Only the attempt that owns the record with a live lease opens an intent. An opening by any other
/// records nothing.
pub(super) async fn an_opening_needs_the_record_and_a_live_lease(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.must_lose(&opening_of(&claim, "a"), "there is no record").await;
    recovery.store.win(&claim, "first claim").await;
    recovery.must_lose(&opening_of(&retry_of(&claim), "a"), "it is another attempt's and another id").await;
    let other = Claim { record_id: claim.record_id, ..retry_of(&claim) };
    recovery.must_lose(&opening_of(&other, "a"), "it is another attempt's").await;
    let other = Claim { record_id: RecordId::random(), ..claim.clone() };
    recovery.must_lose(&opening_of(&other, "a"), "it is another record").await;
    recovery.store.complete_as_owner(&claim.attempt, response("r"), "by the owner").await;
    recovery.must_lose(&opening_of(&claim, "a"), "it is completed").await;

    let lapsing = Claim { lease: fixture.lease(), ..claim_of("lapsing") };
    recovery.store.win(&lapsing, "first claim").await;
    run_out(fixture).await;
    recovery.must_lose(&opening_of(&lapsing, "a"), "the lease has run out").await;
    for claim in [&claim, &lapsing] {
        assert_eq!(recovery.find(opening_of(claim, "a").upstream_key).await, None, "an intent that was lost");
    }
}

/// An intent with other arguments is another call. Once a call may have been sent, it is not
/// opened, and it does not get the outcome of the first: not while its upstream recognizes it, not
/// if the upstream did not know it, and not if a later call was not sent.
pub(super) async fn an_opening_with_other_arguments_is_not_opened_once_a_call_may_have_been_sent(
    fixture: &dyn Fixture,
) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let first = Opening { repeatable_for: LONG, ..opening_of(&claim, "a") };
    let refused = async |why, calls| {
        let other = Opening { arguments: OTHERS, ..next_call(&first) };
        let shown = recovery.must_not_call(&other, why).await;
        assert_eq!((shown.arguments, shown.calls), (first.arguments.clone(), calls), "what is shown");
    };
    recovery.must_open(&first, "a new intent").await;
    refused("it is open", 1).await;
    let (key, second) = (first.upstream_key, next_call(&first));
    recovery.must_open(&second, "the upstream deduplicates").await;
    recovery.must_update(key, IntentFence::Call(second.call), IntentUpdate::NotSent).await;
    refused("the first call may have been sent", 2).await;
    recovery.must_update(key, IntentFence::Call(second.call), IntentUpdate::Absent(None)).await;
    refused("the upstream did not know it", 2).await;
    for calls in [3, 4] {
        let next = next_call(&first);
        recovery.must_open(&next, "the upstream did not know it").await;
        recovery.must_update(key, IntentFence::Call(next.call), IntentUpdate::NotSent).await;
        refused("an earlier call was sent, and not found", calls).await;
        recovery.must_update(key, IntentFence::Call(next.call), IntentUpdate::Absent(None)).await;
        refused("an earlier call was sent, and not found, and the later one was not sent", calls).await;
    }
}

/// An intent of which no call was ever sent is opened with other arguments. They replace the first
/// ones, and count from then on.
pub(super) async fn an_opening_with_other_arguments_replaces_those_of_calls_that_were_not_sent(
    fixture: &dyn Fixture,
) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let first = opening_of(&claim, "a");
    let (key, fence) = (first.upstream_key, |opening: &Opening| IntentFence::Call(opening.call));
    recovery.must_open(&first, "a new intent").await;
    recovery.must_update(key, fence(&first), IntentUpdate::NotSent).await;
    let second = Opening { arguments: OTHERS, ..next_call(&first) };
    recovery.must_open(&second, "the first call was not sent").await;
    recovery.must_update(key, fence(&second), IntentUpdate::NotSent).await;
    recovery.must_update(key, fence(&second), IntentUpdate::Absent(None)).await;
    let third = next_call(&first);
    recovery.must_open(&third, "no call was sent, and no look-up was needed to know").await;
    let shown = recovery.get(key).await;
    assert_eq!((shown.arguments, shown.calls), (first.arguments.clone(), 3), "what is recorded");
    recovery
        .must_not_call(&Opening { arguments: OTHERS, ..next_call(&first) }, "it may have been sent")
        .await;
    recovery.must_update(key, fence(&third), IntentUpdate::NotSent).await;
    recovery.must_open(&Opening { arguments: OTHERS, ..next_call(&first) }, "it was not sent").await;
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 1, "open intents");
}

/// An open intent is called again only as long as its upstream recognizes it. That time counts from
/// the first call.
pub(super) async fn an_open_intent_is_called_again_while_its_upstream_recognizes_it(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    for n in 0..20 {
        let opening = opening_of(&claim, &format!("never {n}"));
        recovery.must_open(&opening, "a new intent").await;
        let shown = recovery.must_not_call(&next_call(&opening), "the upstream does not deduplicate").await;
        assert_eq!((shown.state, shown.call), (IntentState::Open { sent: true }, opening.call));
    }
    let opening = Opening { repeatable_for: fixture.lease(), ..opening_of(&claim, "for a while") };
    recovery.must_open(&opening, "a new intent").await;
    // The longer time of the second call must not extend that of the first.
    let again = Opening { repeatable_for: LONG, ..next_call(&opening) };
    recovery.must_open(&again, "the upstream deduplicates").await;
    let intent = recovery.get(opening.upstream_key).await;
    assert_eq!((intent.call, intent.calls), (again.call, 2), "the last call, and how many");
    run_out(fixture).await;
    recovery.must_not_call(&next_call(&opening), "the upstream may have forgotten the first call").await;
}

/// An intent is called again if its call has certainly not arrived, unless an earlier call may
/// have.
pub(super) async fn an_intent_that_was_not_sent_is_called_again(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let first = Opening { repeatable_for: fixture.lease(), ..opening_of(&claim, "a") };
    let second = next_call(&first);
    let key = first.upstream_key;
    recovery.must_open(&first, "a new intent").await;
    recovery.must_update(key, IntentFence::Call(first.call), IntentUpdate::NotSent).await;
    assert_eq!(recovery.get(key).await.state, IntentState::Open { sent: false });
    run_out(fixture).await;
    recovery.must_open(&second, "the first call was not sent").await;

    let third = next_call(&first);
    recovery.must_open(&third, "the upstream recognizes the second call").await;
    recovery.must_update(key, IntentFence::Call(third.call), IntentUpdate::NotSent).await;
    assert_eq!(
        recovery.get(key).await.state,
        IntentState::Open { sent: true },
        "the second may have arrived"
    );
    run_out(fixture).await;
    recovery.must_not_call(&next_call(&first), "the second call may have arrived").await;
}

/// A finalized or refused intent is shown instead of called again, however often it is opened.
pub(super) async fn a_settled_intent_is_not_called_again(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let refused = IntentState::Dead { reason: "no".to_owned(), absent: false };
    let cases = [
        ("a", finalize(), IntentState::Finalized(resource())),
        ("b", IntentUpdate::Refuse("no".to_owned()), refused),
    ];
    for (name, update, state) in cases {
        let opening = Opening { repeatable_for: LONG, ..opening_of(&claim, name) };
        recovery.must_open(&opening, "a new intent").await;
        recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), update).await;
        for call in [opening.clone(), next_call(&opening)] {
            assert_eq!(recovery.must_not_call(&call, "it is settled").await.state, state);
        }
    }
}

/// An intent that the upstream did not know is called again with the same key, as if for the first
/// time.
pub(super) async fn an_absent_intent_is_called_again(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let opening = opening_of(&claim, "a");
    let key = opening.upstream_key;
    recovery.must_open(&opening, "a new intent").await;
    recovery.must_update(key, IntentFence::Call(opening.call), IntentUpdate::Absent(Some(LONG))).await;
    assert!(matches!(recovery.get(key).await.state, IntentState::Dead { absent: true, .. }));
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 0, "open intents");
    let again = next_call(&opening);
    recovery.must_open(&again, "the upstream does not know it").await;
    let intent = recovery.get(key).await;
    assert_eq!((intent.state, intent.calls), (IntentState::Open { sent: true }, 2));
    assert_eq!((intent.settled_at, intent.absences, intent.looks), (None, 0, 0));
    assert_eq!(recovery.store.get(&claim, "it is in progress").await.unresolved, 1, "open intents");
    recovery.must_not_call(&next_call(&opening), "the second call may have arrived").await;
}

/// The outcome of a call is recorded only for the last call, while the intent is open. With the
/// fence for absent calls, the intent must be absent instead.
pub(super) async fn an_update_is_fenced_by_its_call(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let claim = claim_of("k");
    recovery.store.win(&claim, "first claim").await;
    let opening = Opening { repeatable_for: LONG, ..opening_of(&claim, "a") };
    let (key, call) = (opening.upstream_key, opening.call);
    let nothing = recovery.update(key, IntentFence::Call(call), finalize()).await;
    assert_eq!(nothing, Fenced::Lost, "there is no such intent");
    recovery.must_open(&opening, "a new intent").await;
    recovery.must_not_update(key, IntentFence::Call(CallId::random()), finalize()).await;
    recovery.must_not_update(key, IntentFence::AbsentCall(call), finalize()).await;
    recovery.must_update(key, IntentFence::Call(call), IntentUpdate::Absent(None)).await;
    recovery.must_not_update(key, IntentFence::Call(call), finalize()).await;
    recovery.must_not_update(key, IntentFence::AbsentCall(CallId::random()), finalize()).await;
    recovery.must_update(key, IntentFence::AbsentCall(call), finalize()).await;
    let refused = || IntentUpdate::Refuse("no".to_owned());
    for fence in [IntentFence::Call(call), IntentFence::AbsentCall(call)] {
        recovery.must_not_update(key, fence, refused()).await;
    }

    let first = Opening { repeatable_for: LONG, ..opening_of(&claim, "called again") };
    recovery.must_open(&first, "a new intent").await;
    recovery.must_open(&next_call(&first), "the upstream deduplicates").await;
    recovery.must_not_update(first.upstream_key, IntentFence::Call(first.call), refused()).await;

    let dead = opening_of(&claim, "refused");
    recovery.must_open(&dead, "a new intent").await;
    recovery.must_update(dead.upstream_key, IntentFence::Call(dead.call), refused()).await;
    recovery.must_not_update(dead.upstream_key, IntentFence::AbsentCall(dead.call), finalize()).await;
}

const OTHERS: Bytes = Bytes::from_static(b"others");
