//! Settings of attempts.

use std::time::Duration;

use crate::{
    attempt::settings::{TransactionOptions, checked_lease},
    duration::{capped, limit},
    layer::{IdempotencyLayer, StoreOutage, Strategy, kept_requests::KeptRequests},
    node::{cache::ReplayCache, reaper::Reaper},
    redact::KeyLogging,
};

/// Attempts: leases, time-outs, the store, transactions and recovery.
impl IdempotencyLayer {
    /// Sets the retention: how long a record is kept, counted from its first claim. After that the
    /// key counts as new. Default: 24 h.
    ///
    /// A response that is stored after the retention is over is kept for another retention. So is
    /// what intents and phases have done in an attempt that may run past it.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let week = Duration::from_secs(7 * 24 * 60 * 60);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_retention(week);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if it is shorter than `max_execution` and lease together.
    #[must_use]
    pub fn with_retention(self, retention: Duration) -> Self {
        self.set_attempts(|attempts| attempts.timing.retention = capped(retention))
    }

    /// Sets the lease: how long an attempt owns its record without renewing. Retries are refused
    /// with 409 for that long after a crash. Default: 30 s.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_lease(Duration::from_secs(10));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 100 ms. When the layer is used, if it is shorter than two renewals or
    /// longer than the retention allows.
    #[must_use]
    #[track_caller]
    pub fn with_lease(self, lease: Duration) -> Self {
        let lease = checked_lease(lease);
        self.set_attempts(|attempts| attempts.timing.lease = lease)
    }

    /// Sets the interval between two renewals of a lease. Default: a third of the lease.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_renewal_interval(Duration::from_secs(5));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms. When the layer is used, if it is longer than half the lease.
    #[must_use]
    #[track_caller]
    pub fn with_renewal_interval(self, interval: Duration) -> Self {
        let interval = limit("a renewal interval", interval);
        self.set_attempts(|attempts| attempts.timing.renewal = Some(interval))
    }

    /// Limits how long a handler may run before it is cancelled. Default: 10 min. For a shorter
    /// limit, put a time-out layer inside this one.
    ///
    /// The time begins with the claim. It includes the wait for a place where a layer inside this
    /// one limits concurrency; a request that gets none in that time is not performed: 503
    /// `overloaded`.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_max_execution(Duration::from_secs(60));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms. When the layer is used, if it is longer than the retention
    /// allows.
    #[must_use]
    #[track_caller]
    pub fn with_max_execution(self, max_execution: Duration) -> Self {
        let max_execution = limit("max_execution", max_execution);
        self.set_attempts(|attempts| attempts.timing.max_execution = max_execution)
    }

    /// Limits how long a request waits for the store to claim its key, to at most three quarters of
    /// the lease, and for its response to be [rendered](Self::with_representation). Default: 5 s.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_store_timeout(Duration::from_secs(2));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_store_timeout(self, timeout: Duration) -> Self {
        let timeout = limit("a store time-out", timeout);
        self.set_attempts(|attempts| attempts.store_timeout = timeout)
    }

    /// Sets the behaviour while the store is unavailable. Default: [`StoreOutage::Refuse`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, layer::StoreOutage};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_store_outage(StoreOutage::RunUnprotected);
    /// # }
    /// ```
    #[must_use]
    pub fn with_store_outage(self, behaviour: StoreOutage) -> Self {
        self.set(|settings| settings.on_store_outage = behaviour)
    }

    /// Sets how keys appear in logs. Default: [`KeyLogging::Plain`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, layer::KeyLogging};
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_key_logging(KeyLogging::Redacted);
    /// # }
    /// ```
    #[must_use]
    pub fn with_key_logging(self, logging: KeyLogging) -> Self {
        self.node().log_keys(logging);
        self.set_attempts(|attempts| attempts.key_logging = logging)
    }

    /// Sets how expired records are purged. Default: [`Reaper::default`], every minute. One task
    /// serves a layer and its clones, with the settings of the one that gets a request first.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Reaper};
    /// let reaper = Reaper::every(Duration::from_secs(10), 500);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_reaper(reaper);
    /// # }
    /// ```
    #[must_use]
    pub fn with_reaper(self, reaper: Reaper) -> Self {
        self.set(|settings| settings.reaper = reaper)
    }

    /// Sets how completed records are cached for replays that follow each other closely. Default:
    /// [`ReplayCache::default`], 16 MiB for 5 s.
    ///
    /// The layer, its clones and its handles have one cache, whichever of them it is set with. The
    /// last call counts, and empties it.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ReplayCache};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_replay_cache(ReplayCache::off());
    /// # }
    /// ```
    #[must_use]
    pub fn with_replay_cache(self, cache: ReplayCache) -> Self {
        self.node().replays.configure(cache);
        self
    }

    /// Sets how an attempt has its key for itself. Default: [`Strategy::Claimed`].
    ///
    /// ```
    /// # #[cfg(feature = "postgres")] {
    /// # use tower_idempotency::{IdempotencyLayer, layer::Strategy};
    /// # fn layer(pool: sqlx::PgPool) {
    /// let layer = IdempotencyLayer::new(pool).with_strategy(Strategy::SingleTransaction);
    /// # }
    /// # }
    /// ```
    ///
    /// [`Strategy::SingleTransaction`] needs a store with transactions, as those of PostgreSQL and
    /// SQLite. With any other, every request with a key is refused: 500 `store-misconfigured`.
    /// Lease and renewals have no effect with it, except as defaults of [`TransactionOptions`].
    ///
    /// # Panics
    ///
    /// When the layer is used, if the strategy is that of a single transaction and requests are
    /// [kept](Self::with_kept_requests) or abandoned attempts
    /// [held](crate::layer::AbandonedAttempts::Hold).
    #[must_use]
    pub fn with_strategy(self, strategy: Strategy) -> Self {
        self.set(|settings| settings.strategy = strategy)
    }

    /// Sets how the transactions of handlers (`Tx`) are begun and ended. Default:
    /// [`TransactionOptions::default`].
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, TransactionOptions};
    /// let options = TransactionOptions::default().with_reruns(3);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_transactions(options);
    /// # }
    /// ```
    #[must_use]
    pub fn with_transactions(self, options: TransactionOptions) -> Self {
        self.set_attempts(|attempts| attempts.transactions = options)
    }

    /// Keeps requests before their handlers run, so that a
    /// [`Completer`](crate::recovery::Completer) can send them again when their process has died
    /// and their client does not come back. Off by default.
    ///
    /// Each request with a key then costs another write. A request that cannot be kept is not run:
    /// 503 `store-unavailable`, and its key is given back. The store must be able to keep requests,
    /// as those of this crate are. With any other, every request with a key is refused: 500
    /// `store-misconfigured`.
    ///
    /// A process that dies before the request is kept has not begun its handler: nothing was done,
    /// and only the client's retry performs the request.
    ///
    /// ```
    /// # #[cfg(feature = "memory")] {
    /// # use http::header;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, recovery::KeptRequests};
    /// let kept = KeptRequests::new().add_header(header::ACCEPT);
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_kept_requests(kept);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When the layer is used, if a header that identifies who sends a request would be kept: see
    /// [`KeptRequests`].
    #[must_use]
    pub fn with_kept_requests(self, kept: KeptRequests) -> Self {
        self.set(|settings| settings.kept_requests = Some(kept))
    }
}
