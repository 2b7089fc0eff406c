//! Sends requests again that were abandoned and whose client does not come back.

mod pass;
mod send;

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use tower_service::Service;

pub use self::pass::CompleterPass;
use self::send::{SendRequest, erased};
use crate::{consumer::Consumer, retry::Backoff};

/// Puts back into a request that is sent again what the authentication layer had set, which is never kept: an extension, an
/// internal header.
///
/// The request goes through the whole application, the authentication layer included: let that accept what is put back
/// here. Nothing that comes from a network can set an extension. The [`Consumer`] need not be put back: the idempotency
/// layer takes it from the record.
///
/// The attribute of its implementations is that of the crate `async-trait`. A closure cannot do it: its future would borrow the request that it changes, and no bound says of such a future that it
/// is [`Send`].
#[async_trait]
pub trait Restore: Send + Sync + 'static {
    /// Puts it back, for the consumer of the request's record, or refuses: the user may have been revoked since.
    ///
    /// # Errors
    ///
    /// [`Refused`]. The request is not sent.
    async fn restore(&self, request: &mut Request<()>, consumer: &Consumer) -> Result<(), Refused>;
}

/// Why a request is not sent again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    reason: String,
    for_now: bool,
}

impl Refused {
    /// It must not be sent: it needs the attention of an operator, who is told the reason.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), for_now: false }
    }

    /// It cannot be told yet, because the user database is away, for example. It counts as a try.
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

/// Sends [kept requests](crate::KeptRequests) again that were abandoned: their process has died, or the handler failed after
/// a call of an [intent](crate::Idempotency::intent) or a finished phase, and the client did not come back.
///
/// It is given the whole application, and a [`Restore`] without which it cannot be built. A request that is sent again
/// takes its record over like a retry of the client: it runs once, its response is stored, and the client gets it when it
/// does come back. Not sent are those whose record is held or was claimed under a policy that
/// [holds abandoned attempts](crate::AbandonedAttempts::Hold), and those whose client was answered with a failure on which
/// no intent and no phase hangs: nothing of them is left to complete.
///
/// A request waits for an operator ([`list_requests`](crate::IdempotencyHandle::list_requests)) when [`Restore`] has
/// refused it, when its record is still not completed after the last try, and when it cannot be sent: it cannot be read, it
/// has another fingerprint than its record, or no idempotency layer guards its route any more. Its record stays claimable
/// by the client's retry until it expires; then both are gone.
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "sqlite"))] {
/// # use tower_idempotency::{IdempotencyLayer, StoreError};
/// # async fn start(app: axum::Router, layer: IdempotencyLayer) -> Result<(), StoreError> {
/// use axum::{body::Body, http::Request};
/// use tower_idempotency::{Completer, Consumer, Restore, recovery::Refused};
///
/// /// Set by the authentication layer, which lets requests pass that have it already.
/// #[derive(Clone)]
/// struct User(String);
///
/// struct RestoreUser;
///
/// #[async_trait::async_trait]
/// impl Restore for RestoreUser {
///     async fn restore(&self, request: &mut Request<()>, consumer: &Consumer) -> Result<(), Refused> {
///         if consumer.as_str() == "revoked" {
///             return Err(Refused::new("the user was revoked"));
///         }
///         request.extensions_mut().insert(User(consumer.as_str().to_owned()));
///         Ok(())
///     }
/// }
///
/// layer.handle().start_completer(Completer::new(app.into_service::<Body>(), RestoreUser))?;
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
    /// A completer that sends to this service: the whole application, with everything that a request from the network
    /// passes. An axum `Router` is turned into one by `into_service::<Body>()`, which says what bodies are made of.
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

    /// Sets the pause between two looks for abandoned requests, with a jitter of a quarter. Default: 30 s.
    ///
    /// A request is sent at the first look after its lease is over and
    /// [`with_abandoned_after`](crate::KeptRequests::with_abandoned_after) has passed; and again at the first look after the
    /// [backoff](Self::with_backoff), also where it was not sent because an attempt was running.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_interval(mut self, interval: Duration) -> Self {
        assert!(
            !interval.is_zero(),
            "a completer needs a pause between two looks: use an interval above zero"
        );
        self.interval = interval;
        self
    }

    /// Sets how many requests it sends at most each time it looks. Default: 20.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_batch(mut self, requests: u32) -> Self {
        assert!(requests > 0, "a completer with an empty batch sends nothing: use at least 1");
        self.batch = requests;
        self
    }

    /// Sets how many requests it has under way at once. Default: 4.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_concurrency(mut self, requests: u32) -> Self {
        assert!(requests > 0, "a completer that has no request under way sends none: use at least 1");
        self.concurrency = requests;
        self
    }

    /// Sets after what time a request is sent again that was not completed: `first`, and twice as long each time, but not
    /// longer than `max`. Default: 1 min, and at most 1 h.
    ///
    /// # Panics
    ///
    /// If `first` is zero or longer than `max`.
    #[must_use]
    #[track_caller]
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.backoff = Backoff::checked(first, max);
        self
    }

    /// Sets how often a request is sent at most before it needs the attention of an operator. Default: 5.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_tries(mut self, tries: u32) -> Self {
        assert!(tries > 0, "a completer with no tries sends nothing: use at least 1");
        self.max_tries = tries;
        self
    }

    /// Sets for how long it waits for [`Restore`] and for the response, each. An attempt that was begun goes on all the
    /// same. Default: 15 min, more than the layer's `max_execution`.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_timeout(mut self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "a completer that does not wait learns nothing: use a time-out above zero");
        self.timeout = limit;
        self
    }
}

impl Completer {
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
