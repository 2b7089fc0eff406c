//! The SQLite store, whose intents and kept requests have one fault that a test chooses.

#![allow(unreachable_pub, reason = "a test binary has no users")]

mod intents;
mod records;
mod requests;

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, SqlitePool};
use tempfile::TempDir;
use tower_idempotency::{
    SqliteStore,
    store::{Store, conformance::Fixture},
};

/// What is wrong with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryFault {
    None,
    SubjectIsForgotten,
    RepeatedOpeningIsANewCall,
    OpeningUnfenced,
    ArgumentsAreNotCompared,
    DeclaredAbsentIsNeverSent,
    ArgumentsNeverChange,
    EverythingIsRepeatable,
    NothingIsRepeatable,
    NotSentIsForgotten,
    SettledIsOpenedAgain,
    AbsentIsRefused,
    CallIsNoFence,
    LookupIsFencedByItsCallAlone,
    OperatorResetsTheFence,
    RenewalKeepsTheExpiry,
    OperatorIsNotFenced,
    OpenIntentsDoNotHold,
    OpenIntentsHoldForGood,
    ReleaseDeletes,
    TakeoverPassesOpenings,
    PurgeDeletesUnresolved,
    EvictionTakesIntentsAlong,
    CallsUnderWayAreTaken,
    EveryNameIsTaken,
    NamesFoldCase,
    NothingIsOverlooked,
    OverdueIsForgotten,
    TakenIsNotPutOff,
    LookUpsLookThenWrite,
    AttentionIsNotListed,
    SettledAreNeverPurged,
    KeepingUnfenced,
    RequestIsText,
    LastRequestCounts,
    KeptRecordCountsAnew,
    KeepingARecordUnfenced,
    WaitingRequestsArePurged,
    PurgeOfRequestsIgnoresItsLimit,
    UnfinishedPhaseIsEmpty,
    TimeIsForgotten,
    LeaseIsForgotten,
    LapsedAreNotTaken,
    TakeLooksThenWrites,
    LimitOfTakesIsForgotten,
    PauseIsForgotten,
    TriesAreNotCounted,
    CompletedAreTaken,
    ExpiredAreTaken,
    NextRecordIsReached,
    HeldAreTaken,
    DueAreTaken,
    UnresolvedAreTaken,
    PolicyIsForgotten,
    TriesAreNoFence,
    OperatorKeepsTheTries,
    AttentionIsSentAgain,
    ListOfRequestsIgnoresItsLimit,
    AfterIsForgotten,
    EveryTryCounts,
    DoneIsKept,
}

/// Storage of the store, and the fault of every handle to it.
#[derive(Debug)]
pub struct RecoveryStorage {
    folder: TempDir,
    fault: RecoveryFault,
}

impl RecoveryStorage {
    pub fn new(fault: RecoveryFault) -> Self {
        Self { folder: TempDir::new().unwrap(), fault }
    }
}

#[async_trait::async_trait]
impl Fixture for RecoveryStorage {
    async fn open(&self) -> Arc<dyn Store> {
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(self.folder.path().join("test.db"))
            .create_if_missing(true);
        let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(4).connect_lazy_with(options);
        let faulty = Faulty { inner: SqliteStore::new(pool.clone()), pool, fault: self.fault };
        Arc::new(faulty)
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

#[derive(Clone, Debug)]
pub struct Faulty {
    inner: SqliteStore,
    pool: SqlitePool,
    fault: RecoveryFault,
}

impl Faulty {
    fn has(&self, fault: RecoveryFault) -> bool {
        self.fault == fault
    }

    /// Runs the statement if the store has this fault.
    async fn spoil(&self, fault: RecoveryFault, sql: &str) {
        if self.has(fault) {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(self.tables().await).await.unwrap();
        }
    }

    /// The database, whose tables may not be there yet.
    async fn tables(&self) -> &SqlitePool {
        self.inner.prepare().await.unwrap();
        &self.pool
    }
}
