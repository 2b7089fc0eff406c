//! Proof that the conformance suite can fail: one store for each fault, and the rules that must catch it.

#![allow(clippy::wildcard_enum_match_arm, reason = "a fault changes one thing and leaves the rest as it is")]

mod records;
mod recovery;

use std::{collections::BTreeSet, sync::Arc};

use tower_idempotency::store::conformance::{Fixture, rules};

use records::{Fault, Storage};
use recovery::{RecoveryFault, RecoveryStorage};

/// A fault, and the stores that have it.
trait Broken: Copy + Eq + Send + 'static {
    const NONE: Self;
    fn fixture(self) -> Arc<dyn Fixture>;
}

impl Broken for Fault {
    const NONE: Self = Self::None;

    fn fixture(self) -> Arc<dyn Fixture> {
        Arc::new(Storage::new(self))
    }
}

impl Broken for RecoveryFault {
    const NONE: Self = Self::None;

    fn fixture(self) -> Arc<dyn Fixture> {
        Arc::new(RecoveryStorage::new(self))
    }
}

/// Names of those of the rules that a store with this fault breaks. What a fault opens may be a race, which is lost by
/// chance: a rule gets several goes at it.
fn broken(fault: impl Broken, names: &[&str]) -> BTreeSet<&'static str> {
    let goes = if fault == Broken::NONE { 1 } else { 5 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut broken = BTreeSet::new();
    for _ in 0..goes {
        let left: Vec<&str> = names.iter().copied().filter(|name| !broken.contains(name)).collect();
        broken.append(&mut runtime.block_on(broken_at_once(fault, &left)));
    }
    broken
}

async fn broken_at_once(fault: impl Broken, names: &[&str]) -> BTreeSet<&'static str> {
    let rules = rules().into_iter().filter(|rule| names.contains(&rule.name()));
    let checks = rules.map(|rule| {
        let check = tokio::spawn(async move { rule.check(fault.fixture()).await });
        (rule.name(), check)
    });
    let mut broken = BTreeSet::new();
    for (name, check) in checks.collect::<Vec<_>>() {
        if check.await.is_err() {
            broken.insert(name);
        }
    }
    broken
}

fn all_rules() -> Vec<&'static str> {
    rules().iter().map(|rule| rule.name()).collect()
}

#[test]
fn a_store_without_a_fault_breaks_no_rule() {
    assert_eq!(broken(Fault::None, &all_rules()), BTreeSet::new());
    // With so many databases at once a lease may run out too early.
    let mut left: Vec<&str> = RECOVERY_FAULTS.concat();
    for _ in 0..3 {
        left = broken(RecoveryFault::None, &left).into_iter().collect();
    }
    assert_eq!(left, [""; 0]);
}

#[test]
fn every_rule_is_proved_by_a_fault() {
    let proofs = FAULTS.iter().chain(RECOVERY_FAULTS);
    let proved: BTreeSet<&str> = proofs.flat_map(|rules| rules.iter().copied()).collect();
    assert_eq!(proved, all_rules().into_iter().collect());
}

macro_rules! faults {
    ($list:ident: $faults:ident; $($test:ident: $fault:ident => [$($rule:ident),+],)+) => {
        $(
            #[test]
            fn $test() {
                let expected = [$(stringify!($rule)),+];
                assert_eq!(broken($faults::$fault, &expected), BTreeSet::from(expected));
            }
        )+

        const $list: &[&[&str]] = &[$(&[$(stringify!($rule)),+]),+];
    };
}

faults! {
    FAULTS: Fault;
    claim_looks_then_writes: ClaimLooksThenWrites => [of_many_simultaneous_claims_exactly_one_wins, of_many_simultaneous_different_requests_exactly_one_wins],
    takeover_looks_then_writes: TakeoverLooksThenWrites => [a_lapsed_lease_is_taken_over_by_exactly_one, an_expired_key_is_won_by_exactly_one, of_many_simultaneous_claims_of_an_expired_key_exactly_one_wins, of_many_simultaneous_takeovers_exactly_one_wins, a_completion_and_a_takeover_exclude_each_other],
    completion_looks_then_writes: CompletionLooksThenWrites => [a_completion_and_a_takeover_exclude_each_other],
    resolution_looks_then_writes: ResolutionLooksThenWrites => [of_simultaneous_resolutions_exactly_one_counts, a_resolution_and_a_completion_exclude_each_other],
    purge_looks_then_deletes: PurgeLooksThenDeletes => [a_purge_spares_what_is_claimed_meanwhile, a_purge_spares_what_is_renewed_meanwhile],
    completion_unfenced: CompletionUnfenced => [a_completion_by_another_attempt_changes_nothing, a_completion_after_a_takeover_is_lost, a_completed_record_never_changes, a_held_record_takes_a_late_completion_by_its_attempt_alone],
    release_looks_then_writes: ReleaseLooksThenWrites => [a_release_never_reaches_the_attempt_that_takes_over],
    release_unfenced: ReleaseUnfenced => [a_release_by_another_attempt_changes_nothing, an_attempt_that_was_taken_over_writes_nothing, an_attempt_of_an_earlier_record_writes_nothing, an_attempt_of_an_expired_record_does_not_reach_the_next],
    hold_unfenced: HoldUnfenced => [a_hold_by_another_attempt_changes_nothing, an_attempt_that_was_taken_over_writes_nothing],
    renewal_unfenced: RenewalUnfenced => [a_renewal_without_ownership_is_lost, a_purged_key_is_claimed_anew, renewals_are_answered_in_their_order, the_largest_settings_are_taken],
    completed_is_released_by_its_attempt: CompletedIsReleasedByItsAttempt => [a_completed_record_is_neither_released_nor_held],
    application_clock_judges: ApplicationClockJudges => [a_clock_that_is_ahead_steals_no_lease, a_clock_that_is_ahead_expires_nothing],
    application_clock_sets: ApplicationClockSets => [a_clock_that_is_ahead_makes_no_lease_longer],
    replay_writes: ReplayWrites => [a_replay_writes_nothing, a_completed_record_is_shown_to_every_retry],
    refusal_extends_the_lease: RefusalExtendsTheLease => [a_claim_of_a_taken_key_changes_nothing],
    refusal_of_another_request_records_it: RefusalOfAnotherRequestRecordsIt => [a_claim_of_a_taken_key_changes_nothing, a_different_request_never_gets_the_key],
    fingerprint_unchecked_at_takeover: FingerprintUncheckedAtTakeover => [a_different_request_never_gets_the_key, fingerprints_are_compared_byte_by_byte],
    fingerprint_checked_after_expiry: FingerprintCheckedAfterExpiry => [an_expired_record_counts_as_absent],
    fingerprint_is_text: FingerprintIsText => [fingerprints_are_compared_byte_by_byte],
    purge_deletes_held: PurgeDeletesHeld => [a_held_record_stays_past_its_expiry, a_record_that_would_be_found_held_stays_past_its_expiry],
    purge_deletes_leased: PurgeDeletesLeased => [a_purge_deletes_what_counts_as_absent_and_nothing_else, an_expired_record_with_a_live_lease_is_not_absent],
    purge_miscounts: PurgeMiscounts => [simultaneous_purges_delete_each_record_once],
    purge_ignores_its_limit: PurgeIgnoresItsLimit => [a_purge_keeps_to_its_limit],
    purge_counts_held_against_its_limit: PurgeCountsHeldAgainstItsLimit => [held_records_do_not_use_up_the_limit_of_a_purge],
    keys_fold_case: KeysFoldCase => [keys_are_compared_byte_by_byte, an_absent_key_is_not_found],
    keys_are_trimmed: KeysAreTrimmed => [keys_are_compared_byte_by_byte],
    consumers_fold_case: ConsumersFoldCase => [consumers_are_compared_byte_by_byte],
    identity_is_concatenated: IdentityIsConcatenated => [consumer_and_key_are_kept_apart],
    names_are_cut: NamesAreCut => [the_longest_names_are_kept_whole],
    retention_is_cut_at_a_year: RetentionIsCutAtAYear => [the_largest_settings_are_taken],
    response_is_text: ResponseIsText => [responses_are_kept_byte_by_byte],
    repeated_claim_is_refused: RepeatedClaimIsRefused => [a_repeated_claim_by_the_same_attempt_is_won_again, a_repeated_claim_is_won_again_after_its_lease, simultaneous_claims_by_the_same_attempt_agree],
    repeated_claim_is_a_new_attempt: RepeatedClaimIsANewAttempt => [a_repeated_claim_by_the_same_attempt_is_won_again, simultaneous_claims_by_the_same_attempt_agree],
    ended_attempt_wins_again: EndedAttemptWinsAgain => [an_ended_attempt_does_not_win_again],
    takeover_is_a_new_record: TakeoverIsANewRecord => [a_lapsed_lease_is_taken_over_by_the_same_request, attempt_numbers_count_the_takeovers],
    takeover_restarts_the_retention: TakeoverRestartsTheRetention => [a_lapsed_lease_is_taken_over_by_the_same_request],
    attempt_number_stays: AttemptNumberStays => [attempt_numbers_count_the_takeovers, a_renewed_lease_keeps_others_out_until_it_runs_out],
    abandoned_attempts_are_not_counted: AbandonedAttemptsAreNotCounted => [attempt_numbers_count_the_takeovers, too_many_abandoned_attempts_hold_the_record],
    limit_is_the_latest_claims: LimitIsTheLatestClaims => [the_limit_of_abandoned_attempts_is_the_records_own],
    holds_one_too_late: HoldsOneTooLate => [one_permitted_attempt_holds_at_once, simultaneous_claims_hold_an_abandoned_record_once],
    held_is_counted_again: HeldIsCountedAgain => [a_held_record_is_not_run_again, simultaneous_claims_hold_an_abandoned_record_once],
    held_is_claimable: HeldIsClaimable => [a_held_record_is_not_run_again],
    held_expires: HeldExpires => [a_held_record_stays_past_its_expiry],
    held_forgets_its_attempt: HeldForgetsItsAttempt => [a_held_record_takes_a_late_completion_by_its_attempt_alone, a_late_completion_ends_the_hold],
    held_is_not_released: HeldIsNotReleased => [a_held_record_is_released_by_its_attempt_alone],
    held_is_renewed: HeldIsRenewed => [a_renewal_of_a_held_record_is_skipped],
    lapsed_owner_loses_at_once: LapsedOwnerLosesAtOnce => [a_lapsed_lease_that_nobody_took_is_renewed, a_lapsed_owner_still_completes, a_lapsed_owner_still_releases_and_holds],
    repeated_completion_is_lost: RepeatedCompletionIsLost => [a_repeated_completion_is_completed],
    repeated_completion_replaces: RepeatedCompletionReplaces => [a_repeated_completion_is_completed, a_completed_record_never_changes],
    lost_completion_shows_the_own_attempt: LostCompletionShowsTheOwnAttempt => [a_completion_by_another_attempt_changes_nothing],
    completion_keeps_the_expiry: CompletionKeepsTheExpiry => [a_completion_after_the_expiry_is_kept],
    completion_makes_a_record: CompletionMakesARecord => [a_completion_without_a_record_is_absent, an_operator_gives_a_key_back],
    completion_restarts_the_retention: CompletionRestartsTheRetention => [the_retention_counts_from_the_claim, the_owner_stores_its_response],
    renewals_are_sorted: RenewalsAreSorted => [renewals_are_answered_in_their_order],
    renewal_adds_to_the_lease: RenewalAddsToTheLease => [a_renewal_sets_the_lease_anew],
    renewals_are_cut_at_a_hundred: RenewalsAreCutAtAHundred => [many_leases_are_renewed_by_one_call],
    renewal_loses_what_is_contended: RenewalLosesWhatIsContended => [simultaneous_renewals_lose_no_lease],
    no_renewals_is_an_error: NoRenewalsIsAnError => [no_renewals_have_no_answers],
    expiry_needs_a_purge: ExpiryNeedsAPurge => [an_expired_record_counts_as_absent, an_expired_record_is_not_replayed, a_record_resolved_past_its_expiry_is_kept_anew],
    expiry_ends_a_lease: ExpiryEndsALease => [an_expired_record_with_a_live_lease_is_not_absent],
    expiry_keeps_the_record_id: ExpiryKeepsTheRecordId => [an_expired_record_counts_as_absent],
    retention_starts_with_the_lease: RetentionStartsWithTheLease => [the_retention_counts_from_the_claim],
    release_keeps_the_record: ReleaseKeepsTheRecord => [a_released_key_is_claimable_at_once, fenced_writes_without_a_record_do_nothing],
    list_is_reversed: ListIsReversed => [a_list_begins_with_the_oldest],
    list_ignores_its_filter: ListIgnoresItsFilter => [a_list_is_filtered_by_state],
    list_forgets_the_attempt: ListForgetsTheAttempt => [a_list_shows_what_get_shows],
    get_hides_the_expired: GetHidesTheExpired => [an_expired_record_is_found_until_it_is_purged],
    get_hides_the_lapsed_attempt: GetHidesTheLapsedAttempt => [a_lapsed_lease_shows_nothing_remaining],
    get_finds_anything: GetFindsAnything => [an_absent_key_is_not_found],
    evict_does_nothing: EvictDoesNothing => [an_evicted_key_is_absent],
    resolution_keeps_the_attempt: ResolutionKeepsTheAttempt => [an_operator_completes_a_record],
    resolution_keeps_the_expiry: ResolutionKeepsTheExpiry => [a_record_resolved_past_its_expiry_is_kept_anew, an_operator_completes_a_record],
    resolution_of_live_leases: ResolutionOfLiveLeases => [only_unknown_outcomes_are_resolved],
    prepare_empties_the_store: PrepareEmptiesTheStore => [a_store_may_be_prepared_many_times_at_once],
    completion_tears_the_response: CompletionTearsTheResponse => [retries_during_a_completion_see_all_of_it_or_nothing],
    second_handle_sees_nothing: SecondHandleSeesNothing => [the_first_claim_of_a_key_makes_its_record],
    few_keys_fit: FewKeysFit => [simultaneous_claims_of_different_keys_are_all_won],
}

faults! {
    RECOVERY_FAULTS: RecoveryFault;
    subject_is_forgotten: SubjectIsForgotten => [an_intent_is_kept_as_it_was_opened],
    repeated_opening_is_a_new_call: RepeatedOpeningIsANewCall => [a_repeated_opening_by_the_same_call_is_opened_again],
    opening_unfenced: OpeningUnfenced => [an_opening_needs_the_record_and_a_live_lease],
    arguments_are_not_compared: ArgumentsAreNotCompared => [an_opening_with_other_arguments_is_not_opened_once_a_call_may_have_been_sent],
    declared_absent_is_never_sent: DeclaredAbsentIsNeverSent => [an_opening_with_other_arguments_is_not_opened_once_a_call_may_have_been_sent],
    arguments_never_change: ArgumentsNeverChange => [an_opening_with_other_arguments_replaces_those_of_calls_that_were_not_sent],
    everything_is_repeatable: EverythingIsRepeatable => [an_open_intent_is_called_again_while_its_upstream_recognizes_it, an_intent_that_was_not_sent_is_called_again, a_lapsed_record_with_an_open_intent_is_held_until_that_is_settled],
    nothing_is_repeatable: NothingIsRepeatable => [an_open_intent_is_called_again_while_its_upstream_recognizes_it, a_lapsed_record_whose_intents_may_be_called_again_is_taken_over],
    not_sent_is_forgotten: NotSentIsForgotten => [an_intent_that_was_not_sent_is_called_again, a_lapsed_record_whose_intents_may_be_called_again_is_taken_over],
    settled_is_opened_again: SettledIsOpenedAgain => [a_settled_intent_is_not_called_again, a_released_record_with_an_intent_goes_on],
    absent_is_refused: AbsentIsRefused => [an_absent_intent_is_called_again],
    call_is_no_fence: CallIsNoFence => [an_update_is_fenced_by_its_call],
    lookup_is_fenced_by_its_call_alone: LookupIsFencedByItsCallAlone => [an_update_of_a_lookup_is_fenced_by_all_that_was_seen],
    operator_resets_the_fence: OperatorResetsTheFence => [an_operator_makes_no_earlier_lookup_count_again],
    renewal_keeps_the_expiry: RenewalKeepsTheExpiry => [a_lease_that_outlives_the_expiry_keeps_a_record_with_intents],
    operator_is_not_fenced: OperatorIsNotFenced => [an_operator_spares_calls_under_way_and_finalized_intents],
    open_intents_do_not_hold: OpenIntentsDoNotHold => [a_lapsed_record_with_an_open_intent_is_held_until_that_is_settled],
    open_intents_hold_for_good: OpenIntentsHoldForGood => [a_lapsed_record_with_an_open_intent_is_held_until_that_is_settled],
    release_deletes: ReleaseDeletes => [a_released_record_with_an_intent_goes_on],
    takeover_passes_openings: TakeoverPassesOpenings => [an_opening_and_a_takeover_exclude_each_other],
    purge_deletes_unresolved: PurgeDeletesUnresolved => [a_purge_spares_records_with_open_intents],
    eviction_takes_intents_along: EvictionTakesIntentsAlong => [an_intent_is_settled_after_its_record_has_gone],
    calls_under_way_are_taken: CallsUnderWayAreTaken => [intents_are_taken_once_they_are_due_and_their_attempt_has_ended],
    every_name_is_taken: EveryNameIsTaken => [only_intents_with_the_given_names_are_taken],
    names_fold_case: NamesFoldCase => [only_intents_with_the_given_names_are_taken],
    nothing_is_overlooked: NothingIsOverlooked => [overlooked_intents_are_counted_by_name],
    overdue_is_forgotten: OverdueIsForgotten => [overlooked_intents_are_counted_by_name],
    taken_is_not_put_off: TakenIsNotPutOff => [an_intent_is_taken_by_one_at_a_time, intents_are_taken_once_they_are_due_and_their_attempt_has_ended],
    look_ups_look_then_write: LookUpsLookThenWrite => [an_intent_is_taken_by_one_at_a_time],
    attention_is_not_listed: AttentionIsNotListed => [intents_are_listed_and_counted_by_what_they_wait_for],
    settled_are_never_purged: SettledAreNeverPurged => [settled_intents_are_purged_without_their_record],
    keeping_unfenced: KeepingUnfenced => [a_request_is_kept_by_the_attempt_that_owns_its_record],
    request_is_text: RequestIsText => [a_kept_request_is_shown_as_it_was_kept],
    last_request_counts: LastRequestCounts => [the_first_request_of_a_record_counts],
    kept_record_counts_anew: KeptRecordCountsAnew => [a_kept_record_stays_when_it_is_released, the_first_request_of_a_record_counts],
    keeping_a_record_unfenced: KeepingARecordUnfenced => [a_record_that_has_ended_is_not_kept],
    waiting_requests_are_purged: WaitingRequestsArePurged => [kept_requests_are_purged_once_their_record_is_completed_or_gone],
    purge_of_requests_ignores_its_limit: PurgeOfRequestsIgnoresItsLimit => [a_purge_of_kept_requests_keeps_to_its_limit],
    unfinished_phase_is_empty: UnfinishedPhaseIsEmpty => [a_phase_that_was_not_finished_is_not_found],
    time_is_forgotten: TimeIsForgotten => [a_request_is_not_taken_before_its_time],
    lease_is_forgotten: LeaseIsForgotten => [a_request_is_not_taken_while_an_attempt_has_a_live_lease],
    lapsed_are_not_taken: LapsedAreNotTaken => [a_request_is_taken_once_its_attempt_has_ended],
    take_looks_then_writes: TakeLooksThenWrites => [an_abandoned_request_is_taken_by_one_at_a_time],
    limit_of_takes_is_forgotten: LimitOfTakesIsForgotten => [requests_are_taken_up_to_a_limit],
    pause_is_forgotten: PauseIsForgotten => [a_taken_request_is_taken_again_after_the_pause, an_abandoned_request_is_taken_by_one_at_a_time],
    tries_are_not_counted: TriesAreNotCounted => [a_taken_request_is_taken_again_after_the_pause],
    completed_are_taken: CompletedAreTaken => [a_request_of_a_record_that_has_ended_is_not_taken],
    expired_are_taken: ExpiredAreTaken => [a_request_of_a_record_that_has_ended_is_not_taken],
    next_record_is_reached: NextRecordIsReached => [a_request_does_not_reach_the_next_record_of_its_key],
    held_are_taken: HeldAreTaken => [a_request_of_a_held_record_is_not_taken],
    due_are_taken: DueAreTaken => [a_request_of_a_held_record_is_not_taken],
    unresolved_are_taken: UnresolvedAreTaken => [a_request_waits_for_the_intents_of_its_record],
    policy_is_forgotten: PolicyIsForgotten => [a_request_is_not_taken_under_a_policy_that_holds_abandoned_attempts],
    tries_are_no_fence: TriesAreNoFence => [an_update_of_a_request_is_fenced_by_its_tries],
    operator_keeps_the_tries: OperatorKeepsTheTries => [an_operator_begins_the_tries_of_a_request_anew],
    attention_is_sent_again: AttentionIsSentAgain => [a_request_that_needs_attention_is_listed_and_not_taken, an_update_of_a_request_is_fenced_by_its_tries],
    list_of_requests_ignores_its_limit: ListOfRequestsIgnoresItsLimit => [a_request_that_needs_attention_is_listed_and_not_taken],
    after_is_forgotten: AfterIsForgotten => [a_request_is_sent_again_when_it_is_said_to_be],
    every_try_counts: EveryTryCounts => [a_try_that_was_not_sent_does_not_count],
    done_is_kept: DoneIsKept => [a_request_that_is_done_is_deleted],
}
