//! Rules about the outcomes of tries to send a request again, and about operators.

use std::time::Duration;

use super::{Fixture, requests::send_again, support::*};
use crate::stored::{
    record::Fenced,
    request::{KeptRequest, RequestUpdate},
};

impl Recovery {
    /// Lists the requests that wait for an operator: their keys, and the reasons.
    pub(super) async fn attention(&self) -> Vec<(String, String)> {
        let shown =
            |request: KeptRequest| (request.key.as_str().to_owned(), request.attention.unwrap_or_default());
        let listed = expected(self.inner.list_requests(100).await, "list_requests");
        let mut listed: Vec<_> = listed.into_iter().map(shown).collect();
        listed.sort();
        listed
    }

    /// Takes the one request that is due, and records that it needs attention.
    pub(super) async fn give_up(&self, why: &str) {
        let taken = self.take_request("it is abandoned").await;
        let given_up = self.update_request(taken.record_id, Some(taken.tries), needs_attention(why)).await;
        assert_eq!(given_up, Fenced::Applied, "needs attention");
    }
}

fn needs_attention(why: &str) -> RequestUpdate {
    RequestUpdate::NeedsAttention(why.to_owned())
}

fn not_sent() -> RequestUpdate {
    RequestUpdate::SendAgain { after: Duration::ZERO, tried: false }
}

/// The outcome of a try is recorded only while the request waits to be sent and was not taken again
/// since.
pub(super) async fn an_update_of_a_request_is_fenced_by_its_tries(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let record = claim_of("k").record_id;
    for tries in [None, Some(0)] {
        let updated = recovery.update_request(record, tries, send_again(LONG)).await;
        assert_eq!(updated, Fenced::Lost, "there is no request");
    }
    let record = recovery.abandoned_request("k").await.record_id;
    let update = |tries, update| recovery.update_request(record, Some(tries), update);
    for tries in [1, 2] {
        assert_eq!(recovery.take_request("it is due").await.tries, tries, "tries");
        for other in [tries - 1, tries + 1] {
            assert_eq!(update(other, needs_attention("late")).await, Fenced::Lost, "other tries");
            assert_eq!(update(other, send_again(Duration::ZERO)).await, Fenced::Lost, "other tries");
        }
        assert_eq!(recovery.attention().await, [], "requests that need attention");
        assert_eq!(recovery.keys_taken().await, [""; 0], "requests that are due");
        assert_eq!(update(tries, send_again(Duration::ZERO)).await, Fenced::Applied, "these tries");
    }
    recovery.give_up("first").await;
    for late in [needs_attention("late"), send_again(Duration::ZERO), not_sent()] {
        assert_eq!(update(3, late).await, Fenced::Lost, "it waits for an operator");
    }
    assert_eq!(recovery.attention().await, [("k".to_owned(), "first".to_owned())]);
}

/// An operator can have a request sent again in any state. Its tries are then counted from zero.
pub(super) async fn an_operator_begins_the_tries_of_a_request_anew(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let record = recovery.abandoned_request("k").await.record_id;
    let by_hand = |update| recovery.update_request(record, None, update);
    assert_eq!(by_hand(not_sent()).await, Fenced::Applied, "before the first try");
    assert_eq!(recovery.take_request("it is due").await.tries, 1, "tries");
    assert_eq!(by_hand(not_sent()).await, Fenced::Applied, "during a try");
    assert_eq!(recovery.take_request("it is due").await.tries, 1, "tries");
    assert_eq!(by_hand(needs_attention("by hand")).await, Fenced::Applied, "not to be sent any more");
    assert_eq!(recovery.keys_taken().await, [""; 0], "requests that are due");
    assert_eq!(by_hand(send_again(Duration::ZERO)).await, Fenced::Applied, "it needs attention");
    let taken = recovery.take_request("it is due").await;
    assert_eq!((taken.tries, taken.attention), (1, None), "tries, and what is left of the attention");
}

/// A request that needs attention is listed with the reason. It is not taken until an operator has
/// it sent again.
pub(super) async fn a_request_that_needs_attention_is_listed_and_not_taken(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    recovery.abandoned_request("a").await;
    recovery.give_up("'why'").await;
    let b = recovery.abandoned_request("b").await;
    assert_eq!(recovery.attention().await, [("a".to_owned(), "'why'".to_owned())], "one needs attention");
    assert_eq!(recovery.keys_taken().await, ["b"], "requests that are taken");
    let given_up = recovery.update_request(b.record_id, Some(1), needs_attention("")).await;
    assert_eq!(given_up, Fenced::Applied, "needs attention");
    for (limit, count) in [(1, 1), (100, 2)] {
        let listed = expected(recovery.inner.list_requests(limit).await, "list_requests");
        assert_eq!(listed.len(), count, "requests that are listed, at most {limit}");
    }
    assert!(recovery.has_request(b.record_id).await, "an operator has it sent again");
    assert_eq!(recovery.attention().await, [("a".to_owned(), "'why'".to_owned())], "one needs attention");
    assert_eq!(recovery.keys_taken().await, ["b"], "requests that are taken");
}

/// A request that was not completed is taken again at the time that its update names. The pause of
/// the take does not count then.
pub(super) async fn a_request_is_sent_again_when_it_is_said_to_be(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for (key, after) in [("soon", Duration::ZERO), ("later", LONG)] {
        recovery.abandoned_request(key).await;
        let taken = recovery.take_requests(fixture.lease()).await;
        assert_eq!(taken.len(), 1, "requests that are due");
        let updated = recovery.update_request(taken[0].record_id, Some(1), send_again(after)).await;
        assert_eq!(updated, Fenced::Applied, "to be sent again");
        if key == "soon" {
            assert_eq!(recovery.take_request("it is due immediately").await.tries, 2, "tries");
        }
    }
    run_out(fixture).await;
    assert_eq!(recovery.keys_taken().await, [""; 0], "requests that are due");
}

/// A request that was taken and not sent has not used up a try. The number of tries is never below
/// zero.
pub(super) async fn a_try_that_was_not_sent_does_not_count(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let record = recovery.abandoned_request("k").await.record_id;
    let untaken = recovery.update_request(record, Some(0), not_sent()).await;
    assert_eq!(untaken, Fenced::Applied, "no call has taken it yet");
    for (tries, update) in [(1, not_sent()), (1, send_again(Duration::ZERO)), (2, not_sent())] {
        assert_eq!(recovery.take_request("it is due").await.tries, tries, "tries");
        assert_eq!(recovery.update_request(record, Some(tries), update).await, Fenced::Applied);
    }
    assert_eq!(recovery.take_request("it is due").await.tries, 2, "tries");
}

/// A request that is done is deleted in any state. No other request is.
pub(super) async fn a_request_that_is_done_is_deleted(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let done = recovery.abandoned_request("done").await.record_id;
    assert_eq!(recovery.take_request("it is due").await.tries, 1, "tries");
    let given_up = recovery.abandoned_request("given up").await.record_id;
    recovery.give_up("why").await;
    let other = recovery.abandoned_request("another").await.record_id;
    for record in [done, given_up] {
        let deleted = recovery.update_request(record, Some(1), RequestUpdate::Done).await;
        assert_eq!(deleted, Fenced::Applied, "it was there");
        assert!(!recovery.has_request(record).await, "it is deleted");
        let again = recovery.update_request(record, Some(1), RequestUpdate::Done).await;
        assert_eq!(again, Fenced::Lost, "it is gone");
    }
    assert!(recovery.has_request(other).await, "another request");
}
