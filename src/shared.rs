//! What a layer and its clones share: the store, its claims, how attempts end, and draining.

use std::{
    fmt,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::oneshot,
    task::JoinError,
    time::{Instant, error::Elapsed, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordState, Store, StoreError,
    StoreErrorKind, TRACING_TARGET,
    backoff::Backoff,
    renewal::{Lease, Renewer},
    running::Running,
};

/// Shared by a layer, its clones, its services and its handles.
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    /// Everything that must not be cut off: attempts, claims, the ends of attempts.
    pub(crate) tasks: TaskTracker,
    /// What runs for as long as the layer does.
    pub(crate) background: TaskTracker,
    pub(crate) renewer: Arc<Renewer>,
    pub(crate) running: Arc<Running>,
    /// Guarded requests are refused.
    pub(crate) draining: CancellationToken,
    /// Background tasks end.
    pub(crate) stopped: CancellationToken,
    pub(crate) reaper_runs: AtomicBool,
}

/// How an attempt ends.
#[derive(Clone, Debug)]
pub(crate) enum End {
    Complete(Bytes),
    Release,
    Hold,
}

/// What became of an [`End`].
#[derive(Debug)]
pub(crate) enum Ended {
    /// The record says what the attempt says.
    Done,
    /// The record says something else.
    Lost(Box<Record>),
    /// There is no record.
    Absent,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("store", &self.store)
            .field("tasks", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        let tasks = TaskTracker::new();
        let running = Arc::<Running>::default();
        let renewer = Renewer::new(Arc::clone(&store), tasks.clone(), Arc::clone(&running));
        Arc::new(Self {
            store,
            tasks,
            background: TaskTracker::new(),
            renewer,
            running,
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
            reaper_runs: AtomicBool::new(false),
        })
    }

    /// Claims a key, unless it is one that this process is running.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        claim: &Claim,
        limit: Duration,
    ) -> Result<ClaimOutcome, StoreError> {
        match self.running.find(&claim.attempt.consumer, &claim.attempt.key) {
            Some(record) => Ok(ClaimOutcome::Exists(Box::new(record))),
            None => self.claim(claim.clone(), limit).await,
        }
    }

    /// Claims a key, waiting at most `limit`. A claim that is won after that is released again.
    async fn claim(self: &Arc<Self>, claim: Claim, limit: Duration) -> Result<ClaimOutcome, StoreError> {
        // Near the end of its lease a claim is worth nothing: before it is renewed somebody else may run.
        let usable = claim.lease * 3 / 4;
        let limit = limit.min(usable);
        let sent_at = Instant::now();
        let attempt = claim.attempt.clone();
        let (sender, mut receiver) = oneshot::channel();
        self.tasks.spawn(Arc::clone(self).claim_for(claim, sender));
        let answer = match timeout(limit, &mut receiver).await {
            Ok(answer) => answer.ok(),
            Err(_) => {
                receiver.close();
                receiver.try_recv().ok()
            }
        };
        if matches!(answer, Some(Ok(ClaimOutcome::Won { .. }))) && sent_at.elapsed() > usable {
            self.give_back(attempt);
            return Err(no_answer(limit));
        }
        answer.unwrap_or_else(|| Err(no_answer(limit)))
    }

    /// Learns the outcome of a claim, whether or not somebody still waits for it.
    async fn claim_for(
        self: Arc<Self>,
        claim: Claim,
        caller: oneshot::Sender<Result<ClaimOutcome, StoreError>>,
    ) {
        let (mut sent, mut tries) = (false, 1);
        let outcome = loop {
            let outcome = self.store.claim(&claim).await;
            let Err(error) = &outcome else { break outcome };
            let ambiguous = error.kind() == StoreErrorKind::Ambiguous;
            sent |= ambiguous;
            if !ambiguous || caller.is_closed() {
                break outcome;
            }
            sleep(RETRY.after(tries)).await;
            tries += 1;
        };
        let won = matches!(outcome, Ok(ClaimOutcome::Won { .. }));
        let delivered = caller.send(outcome).is_ok();
        if won && delivered {
            return;
        }
        if sent {
            self.release_late(&claim).await;
        } else if won {
            self.release_unstarted(&claim.attempt).await;
        }
    }

    /// Releases a claim whose reply was lost, and again while it may still arrive: a server that was frozen, or waits
    /// for its standby, carries it out after the first release.
    async fn release_late(&self, claim: &Claim) {
        let end = Instant::now() + claim.lease;
        let mut pause = FIRST_LATE_PAUSE;
        loop {
            self.release_unstarted(&claim.attempt).await;
            if Instant::now() >= end || self.draining.is_cancelled() {
                return;
            }
            let _ = timeout_at(end.min(Instant::now() + pause), self.draining.cancelled()).await;
            pause *= 4;
        }
    }

    /// Releases, in the background, a claim that was won in vain.
    pub(crate) fn give_back(self: &Arc<Self>, attempt: Attempt) {
        let shared = Arc::clone(self);
        self.tasks.spawn(async move { shared.release_unstarted(&attempt).await });
    }

    /// A claim whose handler never started is always released, never held.
    async fn release_unstarted(&self, attempt: &Attempt) {
        let give_up = Instant::now() + UNDO_LIMIT;
        if let Err(error) = self.end(attempt, None, &End::Release, give_up).await {
            tracing::error!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                error = &error as &dyn std::error::Error,
                "a claim without an attempt could not be released; its lease runs out by itself"
            );
        }
    }

    /// Writes how an attempt ended, trying again until `give_up`. Between two tries, and while one hangs, the lease is
    /// renewed, so that nobody takes the record over in the meantime.
    pub(crate) async fn end(
        &self,
        attempt: &Attempt,
        lease: Option<&Lease>,
        end: &End,
        give_up: Instant,
    ) -> Result<Ended, StoreError> {
        let mut tries = 1;
        loop {
            let pause = RETRY.after(tries);
            if let Some(lease) = lease {
                lease.leave();
            }
            let error = match keep_if_late(lease, self.end_once(attempt, end)).await {
                // Also what looks final, like a server that is read-only while another becomes the primary.
                Err(error) if Instant::now() + pause < give_up => error,
                ended => return ended,
            };
            tracing::warn!(
                target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                error = &error as &dyn std::error::Error, "the end of an attempt is not stored yet; trying again"
            );
            if let Some(lease) = lease {
                lease.keep(Duration::ZERO);
            }
            sleep(pause).await;
            tries += 1;
        }
    }

    async fn end_once(&self, attempt: &Attempt, end: &End) -> Result<Ended, StoreError> {
        match end {
            End::Complete(response) => Ok(match self.store.complete(attempt, response.clone()).await? {
                CompleteOutcome::Completed => Ended::Done,
                CompleteOutcome::Lost(record) => Ended::Lost(record),
                CompleteOutcome::Absent => Ended::Absent,
            }),
            End::Release => self.after(attempt, self.store.release(attempt).await?).await,
            End::Hold => {
                let held = self.store.hold(attempt).await?;
                if held == Fenced::Lost {
                    tracing::error!(
                        target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                        "the key could not be held: the record was completed or another attempt has taken it"
                    );
                }
                self.after(attempt, held).await
            }
        }
    }

    /// An attempt that has lost its record must not contradict what another one has stored.
    async fn after(&self, attempt: &Attempt, fenced: Fenced) -> Result<Ended, StoreError> {
        if fenced == Fenced::Applied {
            return Ok(Ended::Done);
        }
        let record = self.store.get(&attempt.consumer, &attempt.key).await?;
        let completed = record.filter(|record| matches!(record.state, RecordState::Completed { .. }));
        Ok(completed.map_or(Ended::Done, |record| Ended::Lost(Box::new(record))))
    }

    /// Runs to its end in a task of its own, whoever stops waiting.
    pub(crate) async fn run_to_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.tasks.spawn(work).await.unwrap_or_else(|error| Err(task_ended(error)))
    }

    /// Runs to its end as a background task, whoever stops waiting.
    pub(crate) async fn in_background<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.background.spawn(work).await.unwrap_or_else(|error| Err(task_ended(error)))
    }
}

/// Renews the lease again if the store takes long: the call may hang for longer than the lease on a broken connection.
async fn keep_if_late<T>(lease: Option<&Lease>, call: impl Future<Output = T>) -> T {
    let Some(lease) = lease else { return call.await };
    let mut call = pin!(call);
    if let Ok(answer) = timeout(lease.interval(), &mut call).await {
        return answer;
    }
    lease.keep(Duration::ZERO);
    let answer = call.await;
    lease.leave();
    answer
}

/// The answer of a store call that ran in a task of its own and was waited for at most `limit`.
pub(crate) fn flatten<T>(
    answer: Result<Result<Result<T, StoreError>, JoinError>, Elapsed>,
    limit: Duration,
) -> Result<T, StoreError> {
    match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(task_ended(error)),
        Err(elapsed) => Err(no_answer(limit).with_source(elapsed)),
    }
}

pub(crate) fn no_answer(limit: Duration) -> StoreError {
    StoreError::new(StoreErrorKind::Ambiguous, format!("the store did not answer within {limit:?}"))
}

fn task_ended(error: JoinError) -> StoreError {
    StoreError::new(StoreErrorKind::Internal, "the task that called the store ended early").with_source(error)
}

/// For how long it is tried to undo what was claimed or opened in vain.
pub(crate) const UNDO_LIMIT: Duration = Duration::from_secs(10 * 60);
pub(crate) const FIRST_LATE_PAUSE: Duration = Duration::from_millis(100);
/// Between two tries of a call to the store.
pub(crate) const RETRY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
