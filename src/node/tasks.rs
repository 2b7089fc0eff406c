//! Tasks of a node: those that must run to their end, and those in the background.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::{runtime::Handle, task::JoinHandle, time::timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{
        TaskTracker,
        task_tracker::{TaskTrackerToken, TrackedFuture},
    },
};

use super::{cache::Replays, work::Work};
use crate::{
    error::{BoxError, StoreError, StoreErrorKind},
    redact::{subscribed, traced},
    retry::jittered,
};

/// The tasks of a node. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Tasks {
    /// Those that must not be cut off: attempts, claims, the ends of attempts.
    tracked: TaskTracker,
    /// Those that run for as long as the layer does.
    background: TaskTracker,
    /// Cancelled when guarded requests are refused.
    pub(crate) draining: CancellationToken,
    /// Cancelled when background tasks must end.
    pub(crate) stopped: CancellationToken,
    /// Emptied by the calls that fail as they do when the connection to the store is lost.
    pub(crate) replays: Arc<Replays>,
}

impl Tasks {
    /// Runs work to its end, even if its caller has gone. Span and subscriber of the caller travel
    /// with it.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.tracked.spawn(traced(work))
    }

    /// The same, on a given runtime.
    pub(crate) fn spawn_on<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        runtime: &Handle,
    ) -> JoinHandle<T> {
        self.tracked.spawn_on(traced(work), runtime)
    }

    /// Lets the caller carry work out itself. Like a task of [`spawn`](Self::spawn), it runs to its
    /// end, and span and subscriber of the caller travel with it.
    pub(crate) fn begin<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Work<T> {
        Work::new(&self.tracked, work)
    }

    /// Lets draining wait for work, in whatever task it runs.
    pub(crate) fn track<F: Future>(&self, work: F) -> TrackedFuture<F> {
        self.tracked.track_future(work)
    }

    /// Lets draining wait until the token is dropped.
    pub(crate) fn token(&self) -> TaskTrackerToken {
        self.tracked.token()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Runs a call of the store to its end and waits for it.
    pub(crate) async fn run_to_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.replays.note(end_of(self.spawn(work)).await)
    }

    /// Runs a call of the store to its end and waits at most `limit`.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.wait_for(self.begin(work), limit).await
    }

    /// Waits at most `limit` for a task or work with the store. After that it goes on, and its
    /// effect is not known.
    pub(crate) async fn wait_for<T, E: Into<BoxError>>(
        &self,
        work: impl Future<Output = Result<Result<T, StoreError>, E>>,
        limit: Duration,
    ) -> Result<T, StoreError> {
        self.replays.note(match timeout(limit, work).await {
            Ok(answer) => answer.unwrap_or_else(|error| Err(task_ended(error))),
            // The handle of a task is dropped, which detaches it; work that is dropped becomes a task.
            Err(elapsed) => Err(no_answer(limit).with_source(elapsed)),
        })
    }

    /// Starts a task that runs for as long as the layer does, with the subscriber of its caller. It
    /// has no span: that of the request that happens to start it would never end.
    pub(crate) fn spawn_background<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.background.spawn(subscribed(work))
    }

    /// Refuses new work and waits for all tasks, the background tasks last. After `limit`, returns
    /// how many are left.
    pub(crate) async fn drain(&self, limit: Duration) -> Result<(), usize> {
        // A closed tracker still takes tasks, and waits for them: a running attempt may need some to end.
        self.draining.cancel();
        self.tracked.close();
        self.background.close();
        let drained = timeout(limit, async {
            self.tracked.wait().await;
            self.stopped.cancel();
            self.background.wait().await;
        })
        .await;
        // Also after the limit, so that no background task outlives the drain.
        self.stopped.cancel();
        drained.map_err(|_| self.tracked.len() + self.background.len())
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} running", self.tracked.len())
    }
}

/// Runs a background task: a pass, then the pause that it asks for, with a jitter of a quarter.
/// Ends with the token, or when a pass finds that its node is gone.
pub(crate) async fn repeat<F: Future<Output = Option<Duration>>>(
    ended: CancellationToken,
    mut pass: impl FnMut() -> F,
) {
    while let Some(pause) = pass().await {
        if timeout(jittered(pause), ended.cancelled()).await.is_ok() {
            return;
        }
    }
}

/// Waits for a task that works with the store, which goes on if its caller has gone.
pub(crate) async fn end_of<T>(task: JoinHandle<Result<T, StoreError>>) -> Result<T, StoreError> {
    task.await.unwrap_or_else(|error| Err(task_ended(error)))
}

pub(crate) fn no_answer(limit: Duration) -> StoreError {
    StoreError::new(StoreErrorKind::Ambiguous, format!("the store did not answer within {limit:?}"))
}

pub(crate) fn task_ended(error: impl Into<BoxError>) -> StoreError {
    StoreError::new(StoreErrorKind::Internal, "the task that called the store ended early").with_source(error)
}
