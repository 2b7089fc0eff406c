//! One attempt, whoever performs it.

pub(crate) mod error;
pub(crate) mod idempotency;
pub(crate) mod intent;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod phase;
pub(crate) mod progress;
pub(crate) mod settle;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod tx;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) mod tx_error;
