//! Finds out whether the calls of dangling intents arrived.

mod pass;

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

pub use self::pass::ReconcilerPass;
use crate::{
    duration::{capped, limit},
    retry::Backoff,
    stored::intent::{Intent, Resource},
};

/// Asks upstream services about calls whose outcome is unknown.
///
/// ```
/// # use tower_idempotency::{Intent, Lookup, Reconcile, Resource};
/// # struct Bank;
/// # impl Bank {
/// #     async fn transfer_by_reference(&self, _: String) -> std::io::Result<Option<String>> {
/// #         Ok(None)
/// #     }
/// # }
/// struct Upstreams {
///     bank: Bank,
/// }
///
/// #[async_trait::async_trait]
/// impl Reconcile for Upstreams {
///     async fn reconcile(
///         &self,
///         intent: &Intent,
///     ) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>> {
///         Ok(match intent.name.as_str() {
///             "bank.transfer" => {
///                 match self.bank.transfer_by_reference(intent.upstream_key.to_string()).await? {
///                     Some(id) => Lookup::Found(Resource::new(id)),
///                     None => Lookup::NotFound,
///                 }
///             }
///             _ => Lookup::Unknown,
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
/// If a node dies or is drained, another node takes its remaining intents after the time that a
/// whole batch may take, about 8 min with the defaults.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, StoreError};
/// # async fn start(layer: IdempotencyLayer) -> Result<(), StoreError> {
/// use std::time::Duration;
/// use tower_idempotency::{Intent, Lookup, Reconciler};
///
/// let ask = |intent: Intent| async move { Ok(Lookup::Unknown) };
/// let reconciler = Reconciler::new(ask).with_timeout(Duration::from_secs(10));
/// layer.handle().start_reconciler(reconciler)?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Reconciler {
    upstreams: Arc<dyn Reconcile>,
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
        }
    }
}

impl Reconciler {
    /// Makes a reconciler that asks these upstreams.
    #[must_use]
    pub fn new(upstreams: impl Reconcile) -> Self {
        Self { upstreams: Arc::new(upstreams), settings: Settings::default() }
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

    /// Sets the greatest number of intents that one call of the store takes. Default: 100.
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

    pub(super) fn interval(&self) -> Duration {
        self.settings.interval
    }
}

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Settings {
    /// The time for which no other node may take a batch: until its last look-up has ended and is
    /// recorded.
    fn taken_for(&self) -> Duration {
        let rounds = self.batch.div_ceil(self.concurrency);
        self.timeout.saturating_mul(rounds.saturating_add(1)).saturating_add(TO_RECORD)
    }
}

/// The time for which the outcome of a look-up is tried to be recorded.
const TO_RECORD: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_taken_for_as_long_as_all_of_its_lookups_may_take() {
        let mut settings = Settings { timeout: Duration::from_secs(10), ..Settings::default() };
        let rounds = settings.batch.div_ceil(settings.concurrency);
        assert!(settings.taken_for() >= settings.timeout * rounds + TO_RECORD);
        settings.timeout = Duration::MAX;
        assert_eq!(settings.taken_for(), Duration::MAX);
    }
}
