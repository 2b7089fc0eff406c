//! The list of rules, and the macros that make tests and values of it.

/// Makes a module of tests, one for each rule of the [suite](crate::store::conformance).
///
/// Takes the name of the module, an expression that makes a fresh
/// [`Fixture`](crate::store::conformance::Fixture), and attributes for every test. The expression
/// may `.await`:
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use tower_idempotency::{MemoryStore, store::{Store, conformance::Fixture}};
/// # #[derive(Debug)]
/// # struct Server(MemoryStore);
/// # impl Server { async fn connect() -> Self { Self(MemoryStore::new()) } }
/// # #[async_trait::async_trait]
/// # impl Fixture for Server {
/// #     async fn open(&self) -> Arc<dyn Store> { Arc::new(self.0.clone()) }
/// #     async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
/// #         self.open().await
/// #     }
/// # }
/// tower_idempotency::conformance_tests!(
///     redis,
///     Server::connect().await,
///     #[ignore = "needs Redis"]
/// );
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($module:ident, $fixture:expr $(, #[$attribute:meta])* $(,)?) => {
        mod $module {
            #[allow(unused_imports)]
            use super::*;

            $crate::__conformance_rules! { @tests ($fixture) { $(#[$attribute])* } }
        }
    };
}

/// Makes the values of [`rules`](crate::store::conformance::rules) and the tests of
/// [`conformance_tests!`] of the one list.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_rules {
    (@values: $($rule:ident)*) => {
        vec![$(Rule {
            name: stringify!($rule),
            check: |fixture| Box::pin(async move { $rule(&*fixture).await }),
        }),*]
    };
    (@tests ($fixture:expr) $attributes:tt: $($rule:ident)*) => {
        $($crate::__conformance_rules! { @test ($fixture) $attributes $rule })*
    };
    (@test ($fixture:expr) { $(#[$attribute:meta])* } $rule:ident) => {
        #[test]
        $(#[$attribute])*
        fn $rule() {
            $crate::store::conformance::run(stringify!($rule), async { $fixture });
        }
    };
    ($($for:tt)*) => {
        $crate::__conformance_rules! { $($for)*:
            a_store_may_be_prepared_many_times_at_once
            the_first_claim_of_a_key_makes_its_record
            the_retention_counts_from_the_claim
            the_largest_settings_are_taken
            of_many_simultaneous_claims_exactly_one_wins
            of_many_simultaneous_different_requests_exactly_one_wins
            simultaneous_claims_of_different_keys_are_all_won
            a_claim_of_a_taken_key_changes_nothing
            a_repeated_claim_by_the_same_attempt_is_won_again
            simultaneous_claims_by_the_same_attempt_agree
            a_repeated_claim_is_won_again_after_its_lease
            an_ended_attempt_does_not_win_again
            a_released_key_is_claimable_at_once
            keys_are_compared_byte_by_byte
            consumers_are_compared_byte_by_byte
            consumer_and_key_are_kept_apart
            the_longest_names_are_kept_whole
            fingerprints_are_compared_byte_by_byte
            responses_are_kept_byte_by_byte
            a_lapsed_lease_is_taken_over_by_the_same_request
            attempt_numbers_count_the_takeovers
            a_lapsed_lease_is_taken_over_by_exactly_one
            of_many_simultaneous_takeovers_exactly_one_wins
            a_different_request_never_gets_the_key
            a_lapsed_lease_shows_nothing_remaining
            too_many_abandoned_attempts_hold_the_record
            one_permitted_attempt_holds_at_once
            the_limit_of_abandoned_attempts_is_the_records_own
            simultaneous_claims_hold_an_abandoned_record_once
            a_held_record_is_not_run_again
            a_held_record_stays_past_its_expiry
            a_record_that_would_be_found_held_stays_past_its_expiry
            a_held_record_takes_a_late_completion_by_its_attempt_alone
            a_late_completion_ends_the_hold
            the_owner_stores_its_response
            a_repeated_completion_is_completed
            a_lapsed_owner_still_completes
            a_completion_after_the_expiry_is_kept
            a_completion_by_another_attempt_changes_nothing
            a_completion_after_a_takeover_is_lost
            a_completion_without_a_record_is_absent
            a_completion_and_a_takeover_exclude_each_other
            a_release_by_another_attempt_changes_nothing
            a_hold_by_another_attempt_changes_nothing
            an_attempt_that_was_taken_over_writes_nothing
            an_attempt_of_an_earlier_record_writes_nothing
            a_lapsed_owner_still_releases_and_holds
            a_release_never_reaches_the_attempt_that_takes_over
            fenced_writes_without_a_record_do_nothing
            a_completed_record_is_neither_released_nor_held
            a_held_record_is_released_by_its_attempt_alone
            a_completed_record_is_shown_to_every_retry
            a_replay_writes_nothing
            a_completed_record_never_changes
            retries_during_a_completion_see_all_of_it_or_nothing
            a_renewal_sets_the_lease_anew
            a_renewed_lease_keeps_others_out_until_it_runs_out
            a_lapsed_lease_that_nobody_took_is_renewed
            a_renewal_without_ownership_is_lost
            a_renewal_of_a_held_record_is_skipped
            renewals_are_answered_in_their_order
            no_renewals_have_no_answers
            many_leases_are_renewed_by_one_call
            simultaneous_renewals_lose_no_lease
            an_expired_record_counts_as_absent
            an_expired_record_is_not_replayed
            an_expired_record_with_a_live_lease_is_not_absent
            an_expired_key_is_won_by_exactly_one
            of_many_simultaneous_claims_of_an_expired_key_exactly_one_wins
            an_attempt_of_an_expired_record_does_not_reach_the_next
            a_purge_deletes_what_counts_as_absent_and_nothing_else
            a_purge_keeps_to_its_limit
            held_records_do_not_use_up_the_limit_of_a_purge
            a_purged_key_is_claimed_anew
            simultaneous_purges_delete_each_record_once
            a_purge_spares_what_is_claimed_meanwhile
            a_purge_spares_what_is_renewed_meanwhile
            an_absent_key_is_not_found
            an_expired_record_is_found_until_it_is_purged
            a_list_is_filtered_by_state
            a_list_begins_with_the_oldest
            a_list_shows_what_get_shows
            an_evicted_key_is_absent
            an_operator_gives_a_key_back
            an_operator_completes_a_record
            a_record_resolved_past_its_expiry_is_kept_anew
            only_unknown_outcomes_are_resolved
            of_simultaneous_resolutions_exactly_one_counts
            a_resolution_and_a_completion_exclude_each_other
            a_clock_that_is_ahead_steals_no_lease
            a_clock_that_is_ahead_expires_nothing
            a_clock_that_is_ahead_makes_no_lease_longer
            an_intent_is_kept_as_it_was_opened
            a_repeated_opening_by_the_same_call_is_opened_again
            an_opening_needs_the_record_and_a_live_lease
            an_opening_with_other_arguments_is_not_opened_once_a_call_may_have_been_sent
            an_opening_with_other_arguments_replaces_those_of_calls_that_were_not_sent
            an_open_intent_is_called_again_while_its_upstream_recognizes_it
            an_intent_that_was_not_sent_is_called_again
            a_settled_intent_is_not_called_again
            an_absent_intent_is_called_again
            an_update_is_fenced_by_its_call
            an_update_of_a_lookup_is_fenced_by_all_that_was_seen
            an_operator_makes_no_earlier_lookup_count_again
            a_lease_that_outlives_the_expiry_keeps_a_record_with_intents
            an_operator_spares_calls_under_way_and_finalized_intents
            a_lapsed_record_with_an_open_intent_is_held_until_that_is_settled
            a_lapsed_record_whose_intents_may_be_called_again_is_taken_over
            a_released_record_with_an_intent_goes_on
            an_opening_and_a_takeover_exclude_each_other
            a_purge_spares_records_with_open_intents
            an_intent_is_settled_after_its_record_has_gone
            intents_are_taken_once_they_are_due_and_their_attempt_has_ended
            only_intents_with_the_given_names_are_taken
            overlooked_intents_are_counted_by_name
            an_intent_is_taken_by_one_at_a_time
            intents_are_listed_and_counted_by_what_they_wait_for
            settled_intents_are_purged_without_their_record
            a_request_is_kept_by_the_attempt_that_owns_its_record
            a_kept_request_is_shown_as_it_was_kept
            the_first_request_of_a_record_counts
            a_kept_record_stays_when_it_is_released
            a_record_that_has_ended_is_not_kept
            kept_requests_are_purged_once_their_record_is_completed_or_gone
            a_purge_of_kept_requests_keeps_to_its_limit
            a_phase_that_was_not_finished_is_not_found
            a_request_is_not_taken_before_its_time
            a_request_is_not_taken_while_an_attempt_has_a_live_lease
            a_request_is_taken_once_its_attempt_has_ended
            an_abandoned_request_is_taken_by_one_at_a_time
            requests_are_taken_up_to_a_limit
            a_taken_request_is_taken_again_after_the_pause
            a_request_of_a_record_that_has_ended_is_not_taken
            a_request_does_not_reach_the_next_record_of_its_key
            a_request_of_a_held_record_is_not_taken
            a_request_waits_for_the_intents_of_its_record
            a_request_is_not_taken_under_a_policy_that_holds_abandoned_attempts
            an_update_of_a_request_is_fenced_by_its_tries
            an_operator_begins_the_tries_of_a_request_anew
            a_request_that_needs_attention_is_listed_and_not_taken
            a_request_is_sent_again_when_it_is_said_to_be
            a_try_that_was_not_sent_does_not_count
            a_request_that_is_done_is_deleted
        }
    };
}
