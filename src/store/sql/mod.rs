//! What the SQL stores share: names, migrations, the rules of the contract as SQL, and the reading of rows and errors.

pub(super) mod call;
pub(super) mod recovery;
pub(crate) mod slot;

use std::{
    borrow::Cow,
    fmt,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use sqlx::{ColumnIndex, Decode, Row, Type};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    consumer::Consumer,
    error::{BoxError, StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    redact::TRACING_TARGET,
    store::transaction::TransactionErrorKind,
    stored::record::{
        Attempt, AttemptId, ClaimOutcome, CompleteOutcome, Record, RecordFilter, RecordId, RecordState,
        ResolveOutcome,
    },
};

/// How often a claim asks the database before it answers
/// [`Contended`](crate::store::ClaimOutcome::Contended): once, and twice again.
pub(super) const CLAIM_ROUNDS: u32 = 3;

/// How many leases one statement extends at most.
pub(super) const RENEW_BATCH: usize = 500;

/// Who creates the tables of an SQL store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableCreation {
    /// The store creates and migrates its tables before its first statement. The default.
    #[default]
    Automatic,
    /// Somebody else does, by `migrate()` with another account or with the files in `migrations/`. For accounts
    /// without the right to create tables: missing or old tables are an error that says what to run.
    Manual,
}

/// A name that cannot be the table prefix or the schema of a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is no usable identifier: 1 to {MAX_IDENTIFIER_BYTES} bytes of a-z, 0-9 and _, not beginning with a digit"
)]
pub struct InvalidIdentifier {
    name: String,
}

/// A lowercase identifier that needs no quoting but for reserved words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identifier(String);

impl Identifier {
    pub(super) fn new(name: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        let name = name.into();
        let begins_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        let consists_well = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if begins_well && consists_well && name.len() <= MAX_IDENTIFIER_BYTES {
            return Ok(Self(name));
        }
        Err(InvalidIdentifier { name })
    }

    pub(super) fn default_prefix() -> Self {
        Self("idempotency".to_owned())
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A value that is made at the first use. Whoever finds it being made waits only for a while, so that callers do not
/// pile up behind a database that is away.
#[derive(Debug)]
pub(super) struct Lazy<T> {
    value: OnceLock<T>,
    turn: tokio::sync::Mutex<()>,
}

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self { value: OnceLock::new(), turn: tokio::sync::Mutex::default() }
    }
}

impl<T> Lazy<T> {
    pub(super) async fn get_or_make(
        &self,
        make: impl AsyncFnOnce() -> Result<T, StoreError>,
    ) -> Result<&T, StoreError> {
        if let Some(value) = self.value.get() {
            return Ok(value);
        }
        let Ok(_turn) = timeout(MAX_WAIT_FOR_TURN, self.turn.lock()).await else {
            let message = "the tables are still being set up";
            return Err(StoreError::new(StoreErrorKind::Unavailable, message));
        };
        match self.value.get() {
            Some(value) => Ok(value),
            None => {
                let value = make().await?;
                Ok(self.value.get_or_init(|| value))
            }
        }
    }
}

/// One migration file.
#[derive(Debug)]
pub(super) struct Migration {
    pub(super) version: i64,
    pub(super) file: &'static str,
    sql: &'static str,
}

impl Migration {
    pub(super) const fn new(version: i64, file: &'static str, sql: &'static str) -> Self {
        Self { version, file, sql }
    }

    /// The statements of the file for tables with this prefix.
    pub(super) fn sql(&self, prefix: &Identifier) -> String {
        self.sql.replace("idempotency_", &format!("{prefix}_"))
    }
}

/// The migrations that tables of version `found` (0: there are none) lack.
pub(super) fn pending(found: i64, known: &'static [Migration]) -> Result<&'static [Migration], StoreError> {
    let newest = known.last().map_or(0, |migration| migration.version);
    if found > newest {
        return Err(misconfigured(format!(
            "the tables are of version {found}, this release of tower-idempotency knows versions up to {newest}: upgrade it"
        )));
    }
    let first = known.iter().position(|migration| migration.version > found).unwrap_or(known.len());
    Ok(&known[first..])
}

/// The error for tables that are missing or old and that this store must not touch.
pub(super) fn tables_missing(pending: &[Migration], schema: Option<&str>, prefix: &Identifier) -> StoreError {
    let files = pending.iter().map(|migration| migration.file).collect::<Vec<_>>().join(", ");
    let place = schema.map(|schema| format!(" in schema {schema}")).unwrap_or_default();
    misconfigured(format!(
        "tables `{prefix}_*`{place} are missing or old: run {files}, or call migrate() with an account that may create tables"
    ))
}

/// What is known once the tables are there.
#[derive(Debug)]
pub(super) struct Ready<S> {
    pub(super) statements: S,
    pub(super) warnings: Vec<String>,
}

impl<S> Ready<S> {
    /// Logs the warnings.
    pub(super) fn new(statements: S, warnings: Vec<String>) -> Self {
        for warning in &warnings {
            tracing::warn!(target: TRACING_TARGET, "{warning}");
        }
        Self { statements, warnings }
    }
}

pub(super) fn misconfigured(message: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Misconfigured, message)
}

/// Fills the names in braces of a statement. Values may hold further names of entries that come later.
pub(super) fn render(template: &str, names: &[(&str, &str)]) -> String {
    let rules = RULES.iter().chain(names);
    rules.fold(template.to_owned(), |sql, (name, value)| sql.replace(name, value))
}

/// What a statement that lists records calls a filter: the state to show, or `all`.
pub(super) fn filter(filter: RecordFilter) -> &'static str {
    match filter {
        RecordFilter::All => "all",
        RecordFilter::InProgress => "in_progress",
        RecordFilter::Held => "held",
        RecordFilter::Completed => "completed",
    }
}

/// A duration in microseconds, at least one and at most a hundred years, which every database can add to its clock.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(MAX_MICROS).clamp(1, MAX_MICROS)
}

/// Reads a row of `{columns}`.
pub(super) fn record<'r, R>(row: &'r R) -> Result<Record, sqlx::Error>
where
    R: Row,
    &'static str: ColumnIndex<R>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
    String: Decode<'r, R::Database> + Type<R::Database>,
    Uuid: Decode<'r, R::Database> + Type<R::Database>,
    Vec<u8>: Decode<'r, R::Database> + Type<R::Database>,
{
    let state = match row.try_get::<String, _>("state")?.as_str() {
        "in_progress" => RecordState::in_progress(span(row.try_get("lease_left")?)),
        "held" => RecordState::Held,
        "completed" => {
            let response: Option<Vec<u8>> = row.try_get("response")?;
            RecordState::completed(response.map(Bytes::from).unwrap_or_default())
        }
        unknown => return Err(decoding(format!("unknown state {unknown:?}"))),
    };
    let consumer = Consumer::new(row.try_get::<String, _>("consumer")?).map_err(decoding)?;
    let key = IdempotencyKey::new(row.try_get::<String, _>("key")?).map_err(decoding)?;
    let fingerprint = Fingerprint::from_bytes(row.try_get::<Vec<u8>, _>("fingerprint")?);
    let mut record = Record::new(RecordId::from_uuid(row.try_get("id")?), consumer, key, fingerprint, state);
    record.attempt = row.try_get::<Option<Uuid>, _>("attempt")?.map(AttemptId::from_uuid);
    record.attempt_number = number(row.try_get("attempt_number")?)?;
    record.abandoned = number(row.try_get("abandoned")?)?;
    record.unresolved = number(row.try_get("unresolved")?)?;
    record.created_at = instant(row.try_get("created_at")?);
    record.expires_at = instant(row.try_get("expires_at")?);
    Ok(record)
}

pub(super) fn number<N: TryFrom<i64>>(value: i64) -> Result<N, sqlx::Error>
where
    N::Error: Into<BoxError>,
{
    value.try_into().map_err(decoding)
}

/// The outcome of a claim that wrote `record`.
pub(super) fn claimed(record: Record) -> ClaimOutcome {
    match record.state {
        RecordState::InProgress { .. } => ClaimOutcome::won(record.id, record.attempt_number),
        RecordState::Held | RecordState::Completed { .. } => ClaimOutcome::Exists(Box::new(record)),
    }
}

/// The outcome of a completion that changed nothing, by what is there instead.
pub(super) fn not_completed(attempt: &Attempt, found: Option<Record>) -> CompleteOutcome {
    match found {
        None => CompleteOutcome::Absent,
        Some(record)
            if record.attempt == Some(attempt.id)
                && matches!(record.state, RecordState::Completed { .. }) =>
        {
            CompleteOutcome::Completed
        }
        Some(record) => CompleteOutcome::Lost(Box::new(record)),
    }
}

/// The outcome of a resolution that changed nothing, by what is there instead.
pub(super) fn not_resolved(found: Option<Record>) -> ResolveOutcome {
    let Some(record) = found else { return ResolveOutcome::Absent };
    match record.state {
        RecordState::Completed { .. } => ResolveOutcome::AlreadyCompleted,
        RecordState::Held if record.unresolved > 0 => ResolveOutcome::UnresolvedIntents,
        RecordState::InProgress { .. } | RecordState::Held => ResolveOutcome::InProgress,
    }
}

fn decoding(cause: impl Into<BoxError>) -> sqlx::Error {
    sqlx::Error::Decode(cause.into())
}

fn span(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

fn instant(micros: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(span(micros)).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// What an error code of a database means, and what to tell an operator.
pub(super) type Meaning = (StoreErrorKind, &'static str);

/// The code that the database gave an error.
pub(crate) fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(|error| error.code())
}

/// What an error of a statement means for its transaction, by the codes of PostgreSQL; those of SQLite mean that the
/// statement failed.
pub(crate) fn transaction_error_kind(error: &sqlx::Error) -> TransactionErrorKind {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, Protocol, WorkerCrashed};
    match (error, code(error).as_deref()) {
        (_, Some("25P01" | "3B001")) => TransactionErrorKind::Ended,
        (_, Some("40001" | "40P01" | "55P03")) => TransactionErrorKind::Conflict,
        (_, Some("57014" | "25P03" | "25P04")) => TransactionErrorKind::Lost,
        (_, Some(code)) if code.starts_with("57P") || code.starts_with("08") => TransactionErrorKind::Lost,
        (Io(_) | Protocol(_) | WorkerCrashed | PoolClosed | PoolTimedOut, _) => TransactionErrorKind::Lost,
        _ => TransactionErrorKind::Failed,
    }
}

/// The savepoint that marks the transaction of an attempt.
pub(super) fn savepoint(attempt: &Attempt) -> String {
    format!("tower_idempotency_{}", attempt.id.as_uuid().simple())
}

/// An error from taking a connection out of a pool: nothing was sent.
pub(super) fn connect_error(source: sqlx::Error, refusal: fn(&str) -> Option<&'static str>) -> StoreError {
    let error = match (&source, code(&source).as_deref().and_then(refusal)) {
        (_, Some(refused)) => misconfigured(refused),
        (sqlx::Error::Configuration(_), None) => {
            misconfigured("the settings of the connection are not usable")
        }
        _ => StoreError::new(StoreErrorKind::Unavailable, "no connection to the database"),
    };
    error.with_source(source)
}

/// An error from a statement that was sent.
pub(super) fn statement_error(
    operation: &str,
    source: sqlx::Error,
    meaning: fn(&str) -> Meaning,
) -> StoreError {
    use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, WorkerCrashed};
    #[expect(clippy::wildcard_enum_match_arm, reason = "everything else comes from encoding and decoding")]
    let (kind, hint) = match &source {
        Database(error) => error.code().map_or((StoreErrorKind::Internal, UNEXPECTED), |code| meaning(&code)),
        Io(_) | Protocol(_) | WorkerCrashed => {
            (StoreErrorKind::Ambiguous, "the connection broke before the reply")
        }
        PoolClosed | PoolTimedOut => (StoreErrorKind::Unavailable, "no connection to the database"),
        _ => (StoreErrorKind::Internal, "a row could not be read"),
    };
    StoreError::new(kind, format!("{operation}: {hint}")).with_source(source)
}

pub(super) const UNEXPECTED: &str = "the database answered with an unexpected error";

const MAX_WAIT_FOR_TURN: Duration = Duration::from_secs(5);
const MAX_IDENTIFIER_BYTES: usize = 40;
const MAX_MICROS: i64 = 100 * 365 * 24 * 60 * 60 * 1_000_000;

/// The rules of the contract, for a record `{r}`. Each may use those below it; `{r}`, `{now}`, `{times}`, `{attempt}`
/// and `{fingerprint}` are the store's.
const RULES: &[(&str, &str)] = &[
    (
        "{action}",
        "CASE WHEN {absent} THEN 'anew'
              WHEN {r}.state <> 'in_progress' THEN 'none'
              WHEN {r}.attempt = {attempt} THEN 'again'
              WHEN {r}.lease_until > {now} OR {r}.fingerprint <> {fingerprint} OR {blocked} THEN 'none'
              WHEN {due} THEN 'hold'
              ELSE 'takeover' END",
    ),
    (
        "{columns}",
        "{r}.consumer, {r}.key, {r}.id, {r}.fingerprint, CASE WHEN {held} THEN 'held' ELSE {r}.state END AS state, {r}.attempt,
         CAST({r}.attempt_number AS bigint) AS attempt_number, CAST(CASE WHEN {due} THEN {r}.abandoned + 1 ELSE {r}.abandoned END AS bigint) AS abandoned,
         CAST({r}.unresolved AS bigint) AS unresolved, {times}, {r}.response",
    ),
    (
        "{absent}",
        "({r}.expires_at <= {now} AND NOT {held}
            AND NOT ({r}.state = 'in_progress' AND ({r}.lease_until > {now} OR {r}.unresolved > 0)))",
    ),
    // What is freed long after it was made must not be forgotten in the same moment.
    (
        "{kept_on}",
        "CASE WHEN {r}.expires_at <= {now} AND {r}.state <> 'completed'
                  AND ({r}.unresolved > 0 OR {held} OR {r}.lease_until > {now})
              THEN {kept_anew} ELSE {r}.expires_at END",
    ),
    // Neither must its response.
    ("{answered_on}", "CASE WHEN {r}.expires_at <= {now} THEN {kept_anew} ELSE {r}.expires_at END"),
    // For its whole retention from now on. So is what a lease outlives, if something hangs on it: what was done under the
    // lease is not forgotten when it runs out.
    ("{kept_anew}", "{now} + ({r}.expires_at - {r}.created_at)"),
    ("{releasable}", "({resolvable} AND NOT {unrepeatable})"),
    ("{resolvable}", "({r}.state = 'held' OR {lapsed})"),
    ("{held}", "({r}.state = 'held' OR {due} OR {blocked})"),
    ("{blocked}", "({lapsed} AND {unrepeatable})"),
    ("{unrepeatable}", "COALESCE({r}.repeatable_until <= {now}, FALSE)"),
    ("{due}", "({lapsed} AND {r}.attempt IS NOT NULL AND {r}.abandoned + 1 >= {r}.max_abandoned)"),
    ("{lapsed}", "({r}.state = 'in_progress' AND {r}.lease_until <= {now})"),
    ("{mine}", "({r}.attempt = {attempt} AND {r}.state IN ('in_progress', 'held'))"),
];
