//! Work that runs to its end, in the task of its caller for as long as that waits.

use std::{
    fmt,
    future::Future,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    runtime::Handle,
    task::{JoinError, JoinHandle},
};
use tokio_util::task::{TaskTracker, task_tracker::TrackedFuture};

use crate::redact::{Traced, traced};

/// Work that its caller polls. Dropped before its end, it goes on in a task of its own: a claim
/// that is cut off in the middle would leave its key or its connection behind.
pub(crate) struct Work<T> {
    state: State<T>,
    runtime: Handle,
    /// A task needs bounds that a type with a destructor cannot have.
    run_in_task: fn(Rest<T>, &Handle) -> JoinHandle<T>,
}

enum State<T> {
    Here(Rest<T>),
    InTask(JoinHandle<T>),
    Ended,
}

/// Boxed before it is wrapped, so that it is moved once.
type Rest<T> = TrackedFuture<Traced<Pin<Box<dyn Future<Output = T> + Send>>>>;

/// The work has panicked, or its runtime has shut down.
#[derive(Debug, thiserror::Error)]
#[error("it ended early")]
pub(crate) struct EndedEarly(#[source] Option<JoinError>);

impl<T> Work<T> {
    /// Panics outside of a runtime.
    pub(super) fn new(tracker: &TaskTracker, work: impl Future<Output = T> + Send + 'static) -> Self
    where
        T: Send + 'static,
    {
        Self {
            state: State::Here(tracker.track_future(traced(Box::pin(work)))),
            runtime: Handle::current(),
            run_in_task: |rest, runtime| runtime.spawn(rest),
        }
    }

    /// Polls the work. If it does not end immediately, the rest goes on in a task, even if the
    /// caller keeps it and does not poll it again.
    pub(crate) fn poll_or_move(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, EndedEarly>> {
        match Pin::new(&mut *self).poll(cx) {
            Poll::Pending if self.move_to_task() => Pin::new(self).poll(cx),
            polled @ (Poll::Pending | Poll::Ready(_)) => polled,
        }
    }

    fn move_to_task(&mut self) -> bool {
        match mem::replace(&mut self.state, State::Ended) {
            State::Here(rest) => {
                self.state = State::InTask((self.run_in_task)(rest, &self.runtime));
                true
            }
            moved @ (State::InTask(_) | State::Ended) => {
                self.state = moved;
                false
            }
        }
    }
}

impl<T> Future for Work<T> {
    type Output = Result<T, EndedEarly>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let end = match &mut self.state {
            State::Here(rest) => match catch_unwind(AssertUnwindSafe(|| Pin::new(rest).poll(cx))) {
                Ok(polled) => Ok(ready!(polled)),
                Err(_) => Err(EndedEarly(None)),
            },
            State::InTask(task) => ready!(Pin::new(task).poll(cx)).map_err(|error| EndedEarly(Some(error))),
            // Polled after its end, it never completes again.
            State::Ended => return Poll::Pending,
        };
        self.state = State::Ended;
        Poll::Ready(end)
    }
}

impl<T> Drop for Work<T> {
    fn drop(&mut self) {
        // A task that is not awaited goes on.
        self.move_to_task();
    }
}

impl<T> fmt::Debug for Work<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("ended", &matches!(self.state, State::Ended)).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

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
    async fn what_does_not_end_immediately_needs_no_more_polls() {
        let (sender, ended) = oneshot::channel();
        let mut work = Work::new(&TaskTracker::new(), async {
            tokio::task::yield_now().await;
            sender.send(()).unwrap();
            7
        });
        let first = poll_fn(|cx| Poll::Ready(work.poll_or_move(cx))).await;
        assert!(first.is_pending());
        ended.await.unwrap();
        assert_eq!(poll_fn(|cx| work.poll_or_move(cx)).await.unwrap(), 7);
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
