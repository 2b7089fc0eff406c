//! The contract of [`Store`] as tests: each rule is a function and a test.
//!
//! Every store of this crate passes them. To test a store of your own, implement [`Fixture`], which
//! gives a test its storage. [`conformance_tests!`](crate::conformance_tests) then makes the tests:
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use tower_idempotency::{MemoryStore, conformance_tests, store::{Store, conformance::Fixture}};
//!
//! #[derive(Debug, Default)]
//! struct InMemory(MemoryStore);
//!
//! #[async_trait::async_trait]
//! impl Fixture for InMemory {
//!     async fn open(&self) -> Arc<dyn Store> {
//!         Arc::new(self.0.clone())
//!     }
//!
//!     async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
//!         self.open().await
//!     }
//! }
//!
//! conformance_tests!(memory, InMemory::default());
//! # fn main() {}
//! ```
//!
//! The crate that holds the tests needs `async-trait` for its fixture. It needs neither tokio nor
//! tokio's macros, because each test has a runtime of its own. A store that needs a server takes an
//! attribute: `conformance_tests!(redis, Server::connect().await, #[ignore = "needs Redis"])`.
//!
//! A store without a [`RecoveryStore`](crate::store::RecoveryStore) passes the rules about it. If
//! yours has one, also test that [`Store::recovery`] returns it.
//!
//! # Time
//!
//! Many rules wait until a lease has run out, and expect that it did not run out earlier. The
//! [lease](Fixture::lease) of the fixture sets their pace. Most tests only wait: run many more of
//! them in parallel than there are cores (`RUST_TEST_THREADS`). A store that tells time by tokio's
//! clock can be tested on a [runtime](Fixture::runtime) whose clock is paused. Waits take no time
//! there.
//!
//! # Another test harness
//!
//! [`rules`] returns the same rules as values.

// A rule fails by a panic, for any outcome that it did not expect.
#![allow(clippy::missing_panics_doc, clippy::wildcard_enum_match_arm)]

mod abandoned_requests;
mod abandonment;
mod claims;
mod clock;
mod completion;
mod expiry;
mod fencing;
mod identity;
mod intents;
mod list;
mod lookups;
mod operators;
mod purge;
mod renewal;
mod replay;
mod requests;
mod support;
mod takeover;
mod takes;
mod tries;

use std::{
    fmt::{self, Debug},
    io,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use self::{
    abandoned_requests::*, abandonment::*, claims::*, clock::*, completion::*, expiry::*, fencing::*,
    identity::*, intents::*, lookups::*, operators::*, purge::*, renewal::*, replay::*, requests::*,
    takeover::*, takes::*, tries::*,
};
use crate::store::Store;

/// Gives a rule its storage and its pace. Each rule gets its own fixture with an empty storage.
#[async_trait]
pub trait Fixture: Debug + Send + Sync {
    /// Opens another handle to this fixture's storage, as another process would.
    async fn open(&self) -> Arc<dyn Store>;

    /// Opens another handle to the same storage, as a machine would whose clock is ahead by this
    /// much.
    ///
    /// A store that never reads the application's clock opens an ordinary handle.
    async fn open_with_clock_ahead(&self, by: Duration) -> Arc<dyn Store>;

    /// Returns a lease that runs out while a rule waits. Default: one second.
    ///
    /// A rule makes a few dozen calls within one lease. If rules fail on a busy machine, return a
    /// longer lease.
    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Builds the runtime of one test. Default: four threads, on which simultaneous calls race.
    ///
    /// A store that tells time by tokio's clock can have that clock paused:
    ///
    /// ```
    /// # fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    /// tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// An error of the operating system if it refuses a thread or a descriptor.
    fn runtime() -> io::Result<Runtime>
    where
        Self: Sized,
    {
        Builder::new_multi_thread().worker_threads(4).enable_all().build()
    }
}

/// One rule of the contract.
#[derive(Clone, Copy)]
pub struct Rule {
    name: &'static str,
    check: fn(Arc<dyn Fixture>) -> Check,
}

type Check = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Rule {
    /// Returns the rule as a sentence, in the form of a function's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Checks the rule against a fixture that no other rule has used.
    ///
    /// # Panics
    ///
    /// Panics if the store breaks the rule, returns an error, or takes longer than a minute in
    /// addition to the waits.
    pub async fn check(&self, fixture: Arc<dyn Fixture>) {
        let limit = LONGEST_CALLS + fixture.lease() * LONGEST_WAITS;
        let checked = timeout(limit, (self.check)(fixture)).await;
        assert!(checked.is_ok(), "{}: the store did not answer within {limit:?}", self.name);
    }
}

impl Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rule").field(&self.name).finish()
    }
}

/// Returns all rules of the contract.
#[must_use]
pub fn rules() -> Vec<Rule> {
    crate::__conformance_rules! { @values }
}

/// Runs one rule on its own runtime. The tests of [`conformance_tests!`](crate::conformance_tests)
/// call it.
#[doc(hidden)]
pub fn run<F: Fixture + 'static>(name: &str, fixture: impl Future<Output = F>) {
    let runtime = F::runtime().unwrap_or_else(|error| panic!("no runtime for the rule {name}: {error}"));
    runtime.block_on(async {
        let Some(rule) = rules().into_iter().find(|rule| rule.name == name) else {
            panic!("there is no rule {name}");
        };
        rule.check(Arc::new(fixture.await)).await;
    });
}

const LONGEST_CALLS: Duration = Duration::from_secs(60);
/// The number of leases that a rule waits at most.
const LONGEST_WAITS: u32 = 10;
