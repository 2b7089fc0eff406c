//! Names, tables and migrations, before the first statement.

use std::{fmt, sync::OnceLock, time::Duration};

use tokio::time::timeout;

use super::{Statements, errors::misconfigured};
use crate::{
    error::{StoreError, StoreErrorKind},
    redact::TRACING_TARGET,
};

/// Creation of the tables of an SQL store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableCreation {
    /// The store creates and migrates its tables before its first statement. This is the default.
    #[default]
    Automatic,
    /// You create them: by `migrate()` with another account, or with the files in `migrations/`.
    /// Choose this if the application's account may not create tables. If tables are missing or
    /// old, the error says what to run.
    Manual,
}

/// A name that cannot be the table prefix or the schema of a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is no usable identifier: 1 to {MAX_IDENTIFIER_BYTES} bytes of a-z, 0-9 and _, \
     not beginning with a digit"
)]
pub struct InvalidIdentifier {
    name: String,
}

/// A lowercase identifier that needs no quotes unless it is a reserved word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Identifier(String);

impl Identifier {
    pub(in crate::store) fn new(name: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        let name = name.into();
        let begins_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        let consists_well = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if begins_well && consists_well && name.len() <= MAX_IDENTIFIER_BYTES {
            return Ok(Self(name));
        }
        Err(InvalidIdentifier { name })
    }

    pub(in crate::store) fn default_prefix() -> Self {
        Self("idempotency".to_owned())
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A value that is made at its first use. A call that finds it being made waits only for a while.
/// So calls do not pile up when a database does not answer.
#[derive(Debug)]
pub(in crate::store) struct Lazy<T> {
    value: OnceLock<T>,
    turn: tokio::sync::Mutex<()>,
}

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self { value: OnceLock::new(), turn: tokio::sync::Mutex::default() }
    }
}

impl<T> Lazy<T> {
    pub(in crate::store) async fn get_or_make(
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
        // Another call may have made the value while this one waited for its turn.
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
pub(in crate::store) struct Migration {
    pub(in crate::store) version: i64,
    pub(in crate::store) file: &'static str,
    pub(in crate::store) sql: &'static str,
}

/// Includes a migration file.
macro_rules! migration {
    ($version:literal, $file:literal) => {
        $crate::store::sql::setup::Migration {
            version: $version,
            file: concat!("migrations/", $file),
            sql: include_str!(concat!("../../../migrations/", $file)),
        }
    };
}
pub(in crate::store) use migration;

impl Migration {
    /// Returns the statements of the file, for tables with this prefix.
    pub(in crate::store) fn sql(&self, prefix: &Identifier) -> String {
        self.sql.replace("idempotency_", &format!("{prefix}_"))
    }
}

/// Returns the migrations that tables of version `found` lack. Version 0 means that there are no
/// tables.
pub(in crate::store) fn pending(
    found: i64,
    known: &'static [Migration],
) -> Result<&'static [Migration], StoreError> {
    let newest = known.last().map_or(0, |migration| migration.version);
    if found > newest {
        return Err(misconfigured(format!(
            "the tables are of version {found}, this release of tower-idempotency knows versions up to \
             {newest}: upgrade it"
        )));
    }
    let first = known.iter().position(|migration| migration.version > found).unwrap_or(known.len());
    Ok(&known[first..])
}

/// Makes the error for tables that are missing or old and that this store must not change.
pub(in crate::store) fn tables_missing(
    pending: &[Migration],
    schema: Option<&str>,
    prefix: &Identifier,
) -> StoreError {
    let files = pending.iter().map(|migration| migration.file).collect::<Vec<_>>().join(", ");
    let place = schema.map(|schema| format!(" in schema {schema}")).unwrap_or_default();
    misconfigured(format!(
        "tables `{prefix}_*`{place} are missing or old: run {files}, \
         or call migrate() with an account that may create tables"
    ))
}

/// The data that a store has once its tables exist.
#[derive(Debug)]
pub(in crate::store) struct Ready<Own> {
    pub(in crate::store) statements: Statements<Own>,
    pub(in crate::store) warnings: Vec<String>,
}

impl<Own> Ready<Own> {
    /// Logs the warnings.
    pub(in crate::store) fn new(statements: Statements<Own>, warnings: Vec<String>) -> Self {
        for warning in &warnings {
            tracing::warn!(target: TRACING_TARGET, "{warning}");
        }
        Self { statements, warnings }
    }
}

const MAX_WAIT_FOR_TURN: Duration = Duration::from_secs(5);
const MAX_IDENTIFIER_BYTES: usize = 40;
