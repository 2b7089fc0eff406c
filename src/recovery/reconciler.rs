//! Finds out whether the calls of dangling intents arrived.

mod decision;
mod pass;

use std::{collections::BTreeMap, error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

pub use self::pass::ReconcilerPass;
use crate::{
    attempt::progress::check_name,
    duration::{capped, limit},
    error::{StoreError, StoreErrorKind},
    retry::Backoff,
    stored::intent::{Intent, Resource},
};

/// Asks an upstream service about calls whose outcome is unknown.
///
/// Register it with [`Reconciler::on`] under the name of the intents that it knows: it gets no
/// others.
///
/// ```
/// # use tower_idempotency::{Intent, Lookup, Reconcile, Resource};
/// # struct Bank;
/// # impl Bank {
/// #     async fn transfer_by_reference(&self, _: String) -> std::io::Result<Option<String>> {
/// #         Ok(None)
/// #     }
/// # }
/// struct Transfers(Bank);
///
/// #[async_trait::async_trait]
/// impl Reconcile for Transfers {
///     async fn reconcile(
///         &self,
///         intent: &Intent,
///     ) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>> {
///         let reference = intent.upstream_key.to_string();
///         Ok(match self.0.transfer_by_reference(reference).await? {
///             Some(id) => Lookup::Found(Resource::new(id)),
///             None => Lookup::NotFound,
///         })
///     }
/// }
/// ```
///
/// Implementations carry the attribute of the crate `async-trait`. A closure that returns a future
/// implements it too: `|intent: Intent| async move { Ok(Lookup::Unknown) }`.
#[async_trait]
pub trait Reconcile: Send + Sync + 'static {
    /// Looks up one call by its [upstream key](Intent::upstream_key), or by whatever the upstream
    /// offers instead.
    ///
    /// It must not change anything, and it must not make the call again: the next attempt does
    /// that.
    ///
    /// # Errors
    ///
    /// An error, a panic and a time-out are logged and count as [`Lookup::Unknown`].
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn Error + Send + Sync>>;
}

#[async_trait]
impl<F, Fut> Reconcile for F
where
    F: Fn(Intent) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Lookup, Box<dyn Error + Send + Sync>>> + Send,
{
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn Error + Send + Sync>> {
        self(intent.clone()).await
    }
}

/// The answer of an upstream service about a call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "nothing else can be said of a call")]
pub enum Lookup {
    /// The upstream has made this resource.
    Found(Resource),
    /// The upstream has certainly not processed the call, and the call cannot still be on its way.
    ///
    /// If you are not sure, answer [`Unknown`](Self::Unknown): after two such answers the next
    /// attempt calls again.
    NotFound,
    /// The upstream cannot tell at the moment.
    Unknown,
}

/// Finds out whether the calls of dangling intents arrived: intents that are open past their grace
/// period and whose attempt does not own their record any more.
///
/// Start it with [`start_reconciler`](crate::IdempotencyHandle::start_reconciler). Every node may
/// run one: each intent is taken by one node at a time.
///
/// A look-up is registered under the name of the intents that it knows. Intents with other names
/// are never taken, because another service in the same database may look them up. If none does,
/// they stay due: see [`with_overlooked_after`](Self::with_overlooked_after).
///
/// | answer of the look-up | effect on the intent |
/// |---|---|
/// | [`Found`] | finalized: the next attempt gets the resource without a call |
/// | [`NotFound`] | looked up again [after a pause](Self::with_confirmation_after) |
/// | [`NotFound`] again | dead: the next attempt calls again with the same upstream key |
/// | [`Unknown`], error, panic, time-out | looked up again after [growing pauses][backoff] |
/// | the same, for the [last time](Self::with_max_lookups) | needs attention |
///
/// [`Found`]: Lookup::Found
/// [`NotFound`]: Lookup::NotFound
/// [`Unknown`]: Lookup::Unknown
/// [backoff]: Self::with_backoff
///
/// An intent whose call was certainly not sent is dead without a look-up.
///
/// A dead intent that was not found is looked up a last time [later](Self::with_recheck_after). If
/// its resource is found then, the intent is finalized and needs attention, because a retry in
/// between may have made a second resource.
///
/// An intent that needs attention is looked up again only when an operator asks for it: see
/// [`list_intents`](crate::IdempotencyHandle::list_intents) and
/// [`resolve_intent`](crate::IdempotencyHandle::resolve_intent).
///
/// An intent is taken when its look-up begins, and for 45 s. While a longer look-up runs, that is
/// extended every 15 s. So the intents of a node that dies are taken by another one within a
/// minute. Only a process that is frozen for longer than that may still be looking one up then:
/// of the two answers, the one of the first process is not recorded.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, StoreError};
/// # async fn start(layer: IdempotencyLayer) -> Result<(), StoreError> {
/// use std::time::Duration;
/// use tower_idempotency::{Intent, Lookup, Reconciler};
///
/// let ask = |intent: Intent| async move { Ok(Lookup::Unknown) };
/// let reconciler = Reconciler::new()
///     .on("bank.transfer", ask)
///     .with_timeout(Duration::from_secs(10));
/// layer.handle().start_reconciler(reconciler)?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Reconciler {
    upstreams: Arc<BTreeMap<String, Arc<dyn Reconcile>>>,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    interval: Duration,
    batch: u32,
    concurrency: u32,
    timeout: Duration,
    confirm_after: Duration,
    backoff: Backoff,
    max_lookups: u32,
    recheck_after: Duration,
    overlooked_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            batch: 100,
            concurrency: 8,
            timeout: Duration::from_secs(30),
            confirm_after: Duration::from_secs(60),
            backoff: Backoff::new(Duration::from_secs(30), Duration::from_secs(60 * 60)),
            max_lookups: 10,
            recheck_after: Duration::from_secs(60 * 60),
            overlooked_after: Duration::from_secs(15 * 60),
        }
    }
}

impl Default for Reconciler {
    fn default() -> Self {
        Self::new()
    }
}

impl Reconciler {
    /// Makes a reconciler that looks up nothing yet. Add look-ups with [`on`](Self::on): without
    /// one it is refused when it is started.
    #[must_use]
    pub fn new() -> Self {
        Self { upstreams: Arc::default(), settings: Settings::default() }
    }

    /// Registers the look-up of the intents with this name, as given to
    /// [`intent`](crate::Idempotency::intent). Call it once for each name.
    ///
    /// ```
    /// # use tower_idempotency::{Reconcile, Reconciler};
    /// # fn set(bank: impl Reconcile, provider: impl Reconcile) -> Reconciler {
    /// Reconciler::new().on("bank.transfer", bank).on("provider.charge", provider)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the name is registered already, if it has not 1 to 255 bytes, or if it has a NUL.
    #[must_use]
    #[track_caller]
    pub fn on(mut self, name: impl Into<String>, lookup: impl Reconcile) -> Self {
        let name = name.into();
        assert!(
            check_name(&name).is_ok(),
            "{name:?} is the name of no intent: a name has 1 to 255 bytes, without NUL"
        );
        let upstreams = Arc::make_mut(&mut self.upstreams);
        assert!(
            !upstreams.contains_key(&name),
            "intents with the name {name:?} have a look-up already: register each name once"
        );
        upstreams.insert(name, Arc::new(lookup));
        self
    }

    /// Sets the pause between two passes, with a jitter of a quarter. Default: 30 s. The pause
    /// doubles, up to eight times the interval, while the store fails.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_interval(std::time::Duration::from_secs(60))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.settings.interval = limit("a reconciler's interval", interval);
        self
    }

    /// Sets the greatest number of intents that one call of the store takes. It never takes more
    /// than can be looked up [simultaneously](Self::with_concurrency). Default: 100.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_batch(20)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_batch(mut self, intents: u32) -> Self {
        assert!(intents > 0, "a reconciler with an empty batch takes nothing: use at least 1");
        self.settings.batch = intents;
        self
    }

    /// Sets the greatest number of look-ups that run simultaneously. Default: 8.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_concurrency(2)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_concurrency(mut self, lookups: u32) -> Self {
        assert!(lookups > 0, "a reconciler with a concurrency of zero settles nothing: use at least 1");
        self.settings.concurrency = lookups;
        self
    }

    /// Sets the longest time that a look-up may take. Default: 30 s.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_timeout(std::time::Duration::from_secs(10))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = limit("a time-out for look-ups", timeout);
        self
    }

    /// Sets the pause after which a call that was not found is looked up again, to confirm that it
    /// is absent. Default: 1 min.
    ///
    /// It must be longer than the upstream takes to show a resource it has made. If it is shorter,
    /// a call that did arrive is made again.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_confirmation_after(std::time::Duration::from_secs(300))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_confirmation_after(mut self, pause: Duration) -> Self {
        assert!(
            !pause.is_zero(),
            "an immediate look-up confirms nothing: wait longer than the upstream takes to show a resource"
        );
        self.settings.confirm_after = capped(pause);
        self
    }

    /// Sets the pause after a look-up that learned nothing: `first`, then twice as long each time,
    /// up to `max`, with a jitter of a quarter. Defaults: 30 s and 1 h.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_backoff(Duration::from_secs(10), Duration::from_secs(600))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `first` is shorter than 1 ms or longer than `max`.
    #[must_use]
    #[track_caller]
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.settings.backoff = Backoff::checked(first, max);
        self
    }

    /// Sets the number of look-ups without an answer after which an intent needs attention.
    /// Default: 10.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_max_lookups(20)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_lookups(mut self, lookups: u32) -> Self {
        assert!(lookups > 0, "a reconciler with no look-ups learns nothing: use at least 1");
        self.settings.max_lookups = lookups;
        self
    }

    /// Sets the pause after which a dead intent that was not found is looked up for the last time;
    /// zero turns that off. Default: 1 h.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_recheck_after(std::time::Duration::from_secs(24 * 60 * 60))
    /// # }
    /// ```
    #[must_use]
    pub fn with_recheck_after(mut self, pause: Duration) -> Self {
        self.settings.recheck_after = capped(pause);
        self
    }

    /// Sets the time for which the look-up of an intent with another name must be overdue before it
    /// is reported. Default: 15 min.
    ///
    /// Then nothing looks it up, and its key may be held for ever. The log has an ERROR, once for
    /// each name. Set a longer time if a service that shares the database may be down for longer
    /// than this.
    ///
    /// ```
    /// # use tower_idempotency::Reconciler;
    /// # fn set(reconciler: Reconciler) -> Reconciler {
    /// reconciler.with_overlooked_after(std::time::Duration::from_secs(60 * 60))
    /// # }
    /// ```
    #[must_use]
    pub fn with_overlooked_after(mut self, overdue: Duration) -> Self {
        self.settings.overlooked_after = overdue;
        self
    }

    pub(super) fn interval(&self) -> Duration {
        self.settings.interval
    }

    /// The names of the intents that it looks up. An error if there are none.
    pub(crate) fn names(&self) -> Result<Vec<String>, StoreError> {
        if self.upstreams.is_empty() {
            let message = "this reconciler looks up nothing: register a look-up for the name of each intent \
                           with Reconciler::on";
            return Err(StoreError::new(StoreErrorKind::Misconfigured, message));
        }
        Ok(self.upstreams.keys().cloned().collect())
    }
}

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler")
            .field("names", &self.upstreams.keys())
            .field("settings", &self.settings)
            .finish()
    }
}
