//! A naive store that keeps the contract, but for one fault that a test chooses.

#![allow(unreachable_pub, reason = "a test binary has no users")]

mod calls;
mod rules;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tower_idempotency::store::{Store, conformance::Fixture};

use rules::{BrokenStore, Identity, Row};

/// What is wrong with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    ClaimLooksThenWrites,
    TakeoverLooksThenWrites,
    CompletionLooksThenWrites,
    ResolutionLooksThenWrites,
    PurgeLooksThenDeletes,
    CompletionUnfenced,
    ReleaseLooksThenWrites,
    ReleaseUnfenced,
    HoldUnfenced,
    RenewalUnfenced,
    CompletedIsReleasedByItsAttempt,
    ApplicationClockJudges,
    ApplicationClockSets,
    ReplayWrites,
    RefusalExtendsTheLease,
    RefusalOfAnotherRequestRecordsIt,
    FingerprintUncheckedAtTakeover,
    FingerprintCheckedAfterExpiry,
    FingerprintIsText,
    PurgeDeletesHeld,
    PurgeDeletesLeased,
    PurgeMiscounts,
    PurgeIgnoresItsLimit,
    PurgeCountsHeldAgainstItsLimit,
    KeysFoldCase,
    KeysAreTrimmed,
    ConsumersFoldCase,
    IdentityIsConcatenated,
    NamesAreCut,
    RetentionIsCutAtAYear,
    ResponseIsText,
    RepeatedClaimIsRefused,
    RepeatedClaimIsANewAttempt,
    EndedAttemptWinsAgain,
    TakeoverIsANewRecord,
    TakeoverRestartsTheRetention,
    AttemptNumberStays,
    AbandonedAttemptsAreNotCounted,
    LimitIsTheLatestClaims,
    HoldsOneTooLate,
    HeldIsCountedAgain,
    HeldIsClaimable,
    HeldExpires,
    HeldForgetsItsAttempt,
    HeldIsNotReleased,
    HeldIsRenewed,
    LapsedOwnerLosesAtOnce,
    RepeatedCompletionIsLost,
    RepeatedCompletionReplaces,
    LostCompletionShowsTheOwnAttempt,
    CompletionMakesARecord,
    CompletionKeepsTheExpiry,
    CompletionRestartsTheRetention,
    RenewalsAreSorted,
    RenewalAddsToTheLease,
    RenewalsAreCutAtAHundred,
    RenewalLosesWhatIsContended,
    NoRenewalsIsAnError,
    ExpiryNeedsAPurge,
    ExpiryEndsALease,
    ExpiryKeepsTheRecordId,
    RetentionStartsWithTheLease,
    ReleaseKeepsTheRecord,
    ListIsReversed,
    ListIgnoresItsFilter,
    ListForgetsTheAttempt,
    GetHidesTheExpired,
    GetHidesTheLapsedAttempt,
    GetFindsAnything,
    EvictDoesNothing,
    ResolutionKeepsTheAttempt,
    ResolutionKeepsTheExpiry,
    ResolutionOfLiveLeases,
    PrepareEmptiesTheStore,
    CompletionTearsTheResponse,
    SecondHandleSeesNothing,
    FewKeysFit,
}

/// Storage of the store, and the fault of every handle to it.
#[derive(Debug)]
pub struct Storage {
    rows: Arc<Mutex<HashMap<Identity, Row>>>,
    fault: Fault,
}

impl Storage {
    pub fn new(fault: Fault) -> Self {
        Self { rows: Arc::default(), fault }
    }

    fn handle(&self, ahead: Duration) -> Arc<dyn Store> {
        let rows = match self.fault {
            Fault::SecondHandleSeesNothing => Arc::default(),
            _ => Arc::clone(&self.rows),
        };
        Arc::new(BrokenStore { rows, fault: self.fault, ahead })
    }
}

#[async_trait::async_trait]
impl Fixture for Storage {
    async fn open(&self) -> Arc<dyn Store> {
        self.handle(Duration::ZERO)
    }

    async fn open_with_clock_ahead(&self, by: Duration) -> Arc<dyn Store> {
        self.handle(by)
    }
}
