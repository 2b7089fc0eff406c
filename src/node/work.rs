//! Work that runs to its end, in the task of its caller for as long as that waits.

use std::{
    fmt,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::runtime::Handle;
use tokio_util::task::{TaskTracker, task_tracker::TrackedFuture};

use crate::redact::{Traced, traced};

/// Work that its caller polls. Dropped before its end, it goes on in a task of its own: a claim
/// that is cut off in the middle would leave its key or its connection behind.
pub(crate) struct Work<T> {
    /// `None` after its end.
    rest: Option<Rest<T>>,
    runtime: Handle,
    /// A task needs bounds that a type with a destructor cannot have.
    run_in_task: fn(Rest<T>, &Handle),
}

/// Boxed before it is wrapped, so that it is moved once.
type Rest<T> = TrackedFuture<Traced<Pin<Box<dyn Future<Output = T> + Send>>>>;

/// The work has panicked.
#[derive(Debug, thiserror::Error)]
#[error("it panicked")]
pub(crate) struct Panicked;

impl<T> Work<T> {
    /// Panics outside of a runtime.
    pub(super) fn new(tracker: &TaskTracker, work: impl Future<Output = T> + Send + 'static) -> Self
    where
        T: Send + 'static,
    {
        Self {
            rest: Some(tracker.track_future(traced(Box::pin(work)))),
            runtime: Handle::current(),
            run_in_task: |rest, runtime| drop(runtime.spawn(rest)),
        }
    }
}

impl<T> Future for Work<T> {
    type Output = Result<T, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Polled after its end, it never completes again.
        let Some(rest) = &mut self.rest else { return Poll::Pending };
        let end = match catch_unwind(AssertUnwindSafe(|| Pin::new(rest).poll(cx))) {
            Ok(polled) => Ok(ready!(polled)),
            Err(_) => Err(Panicked),
        };
        self.rest = None;
        Poll::Ready(end)
    }
}

impl<T> Drop for Work<T> {
    fn drop(&mut self) {
        if let Some(rest) = self.rest.take() {
            (self.run_in_task)(rest, &self.runtime);
        }
    }
}

impl<T> fmt::Debug for Work<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("ended", &self.rest.is_none()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        sync::oneshot,
        time::{sleep, timeout},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn dropped_work_runs_to_its_end() {
        let (sender, ended) = oneshot::channel();
        let work = Work::new(&TaskTracker::new(), async {
            sleep(Duration::from_secs(2)).await;
            sender.send(()).unwrap();
        });
        assert!(timeout(Duration::from_secs(1), work).await.is_err());
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn dropped_before_its_first_poll_it_runs_too() {
        let (sender, ended) = oneshot::channel();
        drop(Work::new(&TaskTracker::new(), async { sender.send(()).unwrap() }));
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let work: Work<()> = Work::new(&TaskTracker::new(), async { panic!("in the work") });
        assert!(work.await.is_err());
    }

    #[test]
    fn after_its_runtime_it_is_dropped() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (sender, mut ended) = oneshot::channel::<()>();
        let entered = runtime.enter();
        let work = Work::new(&TaskTracker::new(), async { sender.send(()).unwrap() });
        drop(entered);
        drop(runtime);
        drop(work);
        assert!(ended.try_recv().is_err());
    }
}
