//! Sends abandoned requests again whose client does not come back.

mod pass;
mod send;

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use tower_service::Service;

pub use self::pass::CompleterPass;
use self::send::{SendRequest, erased};
use crate::{consumer::Consumer, duration::limit, retry::Backoff};

/// Restores in a request that is sent again the extensions and internal headers that the
/// authentication layer had set.
///
/// They are never kept with the request. The request goes through the whole application, so the
/// authentication layer must accept what is restored here. An extension is safe for this, because
/// nothing from the network can set one. The [`Consumer`] need not be restored: the idempotency
/// layer takes it from the record.
///
/// Implementations carry the attribute of the crate `async-trait`. A closure cannot implement it:
/// its future would borrow the request, and no bound can say that such a future is [`Send`].
#[async_trait]
pub trait Restore: Send + Sync + 'static {
    /// Restores them for the consumer of the request's record, or refuses: the user may have been
    /// revoked since.
    ///
    /// # Errors
    ///
    /// [`Refused`]. The request is not sent.
    async fn restore(&self, request: &mut Request<()>, consumer: &Consumer) -> Result<(), Refused>;
}

/// The refusal to send a request again, with its reason.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    reason: String,
    for_now: bool,
}

impl Refused {
    /// Refuses for good: the request needs the attention of an operator, who sees the reason.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), for_now: false }
    }

    /// Refuses this try, for example because the user database is away. It counts as a try.
    #[must_use]
    pub fn for_now(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), for_now: true }
    }

    /// The reason.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// Sends [kept requests](crate::recovery::KeptRequests) again whose client did not come back.
///
/// A request is abandoned if its process died, or if its handler failed after a call of an
/// [intent](crate::Idempotency::intent) or a finished phase. Sent again, it takes its record over
/// like a retry of the client: it runs once, its response is stored, and the client gets that
/// response when it does come back.
///
/// A request is not sent while its record is held, and never if the record was claimed under a
/// policy that [holds abandoned attempts](crate::layer::AbandonedAttempts::Hold). A request that
/// failed before any intent or phase is not sent either: nothing of it is left to complete.
///
/// A request is taken for 45 s, or for the first pause of the [backoff](Completer::with_backoff) if
/// that is shorter. While it is sent, that is extended every 15 s. So the requests of a node that
/// dies are taken by another one within a minute, or once the lease of the attempt is over.
///
/// # When an operator is needed
///
/// A request waits in [`list_requests`](crate::IdempotencyHandle::list_requests) if:
///
/// * [`Restore`] refused it for good,
/// * its record is still not completed after the last try,
/// * it cannot be read, or has another fingerprint than its record, or
/// * no idempotency layer guards its route any more.
///
/// The client can still retry it until the record expires; then request and record are gone.
///
/// # Example
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "sqlite"))] {
/// # use tower_idempotency::{IdempotencyLayer, StoreError};
/// # async fn start(app: axum::Router, layer: IdempotencyLayer) -> Result<(), StoreError> {
/// use axum::{body::Body, http::Request};
/// use tower_idempotency::{Consumer, recovery::{Completer, Refused, Restore}};
///
/// /// Set by the authentication layer, which lets requests pass that have it already.
/// #[derive(Clone)]
/// struct User(String);
///
/// struct RestoreUser;
///
/// #[async_trait::async_trait]
/// impl Restore for RestoreUser {
///     async fn restore(
///         &self,
///         request: &mut Request<()>,
///         consumer: &Consumer,
///     ) -> Result<(), Refused> {
///         if consumer.as_str() == "revoked" {
///             return Err(Refused::new("the user was revoked"));
///         }
///         request.extensions_mut().insert(User(consumer.as_str().to_owned()));
///         Ok(())
///     }
/// }
///
/// let completer = Completer::new(app.into_service::<Body>(), RestoreUser).with_max_tries(3);
/// layer.handle().start_completer(completer)?;
/// # Ok(()) }
/// # }
/// ```
#[derive(Clone)]
pub struct Completer {
    send: Arc<SendRequest>,
    restore: Arc<dyn Restore>,
    interval: Duration,
    batch: u32,
    concurrency: u32,
    backoff: Backoff,
    max_tries: u32,
    timeout: Duration,
}

impl Completer {
    /// Makes a completer that sends requests to this service.
    ///
    /// The service is the whole application, with every layer that a request from the network
    /// passes. Turn an axum `Router` into one with `into_service::<Body>()`, which names the type
    /// of the bodies.
    #[must_use]
    pub fn new<S, B, R>(service: S, restore: impl Restore) -> Self
    where
        S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn Error + Send + Sync>>,
        B: From<Bytes> + Send + 'static,
    {
        Self {
            send: erased(service),
            restore: Arc::new(restore),
            interval: Duration::from_secs(30),
            batch: 20,
            concurrency: 4,
            backoff: Backoff::new(Duration::from_secs(60), Duration::from_secs(60 * 60)),
            max_tries: 5,
            timeout: Duration::from_secs(15 * 60),
        }
    }

    /// Sets the pause between two passes, with a jitter of a quarter. Default: 30 s.
    ///
    /// A request is sent in the first pass after its lease is over and
    /// [`with_abandoned_after`](crate::recovery::KeptRequests::with_abandoned_after) has passed. It
    /// is sent again in the first pass after the [backoff](Self::with_backoff), also if it was not
    /// sent because an attempt was running.
    ///
    /// ```
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_interval(std::time::Duration::from_secs(60))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = limit("a completer's interval", interval);
        self
    }

    /// Sets the greatest number of requests that one pass sends. Default: 20.
    ///
    /// ```
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_batch(100)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_batch(mut self, requests: u32) -> Self {
        assert!(requests > 0, "a completer with an empty batch sends nothing: use at least 1");
        self.batch = requests;
        self
    }

    /// Sets the greatest number of requests under way simultaneously. Default: 4.
    ///
    /// ```
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_concurrency(8)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_concurrency(mut self, requests: u32) -> Self {
        assert!(requests > 0, "a completer with a concurrency of zero sends nothing: use at least 1");
        self.concurrency = requests;
        self
    }

    /// Sets the pause before a request that was not completed is sent again: `first`, then twice as
    /// long each time, up to `max`. Defaults: 1 min and 1 h.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_backoff(Duration::from_secs(10), Duration::from_secs(600))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `first` is shorter than 1 ms or longer than `max`.
    #[must_use]
    #[track_caller]
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.backoff = Backoff::checked(first, max);
        self
    }

    /// Sets the number of tries after which a request needs the attention of an operator. Default:
    /// 5.
    ///
    /// ```
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_max_tries(3)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_tries(mut self, tries: u32) -> Self {
        assert!(tries > 0, "a completer with no tries sends nothing: use at least 1");
        self.max_tries = tries;
        self
    }

    /// Sets the longest wait for [`Restore`], and for the response of the application. Default: 15
    /// min, which is longer than the layer's `max_execution`.
    ///
    /// An attempt that has begun continues after that, and its response is stored.
    ///
    /// ```
    /// # use tower_idempotency::recovery::Completer;
    /// # fn set(completer: Completer) -> Completer {
    /// completer.with_timeout(std::time::Duration::from_secs(20 * 60))
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = limit("a completer's time-out", timeout);
        self
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }
}

impl fmt::Debug for Completer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completer")
            .field("interval", &self.interval)
            .field("batch", &self.batch)
            .field("concurrency", &self.concurrency)
            .field("backoff", &self.backoff)
            .field("max_tries", &self.max_tries)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
