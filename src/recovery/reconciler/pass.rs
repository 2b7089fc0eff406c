//! One pass of the reconciler: takes intents, looks them up and records the answers.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    attempt::settle::report_turned_up,
    error::{BoxError, StoreError, StoreErrorKind},
    metrics,
    node::Node,
    recovery::{
        reconciler::{Lookup, Reconciler, decision::Decision},
        schedule::{EXTEND_AFTER, TERM},
    },
    redact::{KeyLogging, TRACING_TARGET, subscribed},
    retry::{Backoff, retry_until},
    store::recovery::RecoveryStore,
    stored::{
        intent::{Intent, IntentState, IntentUpdate, Overlooked},
        record::Fenced,
    },
};

/// The number of intents with each outcome in one pass of a [`Reconciler`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReconcilerPass {
    /// Intents that were taken.
    pub taken: u64,
    /// Intents whose resource was found: they are finalized.
    pub found: u64,
    /// Intents that were not found twice, or whose call was certainly not sent: the call may be
    /// made again.
    pub absent: u64,
    /// Intents that are looked up again later.
    pub again: u64,
    /// Intents that need the attention of an operator from now on.
    pub need_attention: u64,
    /// Intents that were looked up for the last time and not found.
    pub closed: u64,
    /// Intents that were called again, settled or looked up by others in the meantime.
    pub lost: u64,
    /// Intents whose look-up could not be recorded because the store failed. They are looked up
    /// again later.
    pub failed: u64,
    /// Overdue intents with names that no reconciler of this process looks up, at most 1000. They
    /// are not taken.
    pub overlooked: u64,
}

/// The outcome of a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Found,
    TurnedUp,
    Absent,
    Again,
    Attention,
    Closed,
    Lost,
    Failed,
}

impl Outcome {
    /// Label of the metric.
    fn label(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::TurnedUp => "turned_up",
            Self::Absent => "absent",
            Self::Again => "again",
            Self::Attention => "attention",
            Self::Closed => "closed",
            Self::Lost => "lost",
            Self::Failed => "failed",
        }
    }
}

impl ReconcilerPass {
    fn count(&mut self, outcome: Outcome) {
        metrics::looked_up(outcome.label());
        let count = match outcome {
            Outcome::Found => &mut self.found,
            Outcome::Absent => &mut self.absent,
            Outcome::Again => &mut self.again,
            Outcome::TurnedUp | Outcome::Attention => &mut self.need_attention,
            Outcome::Closed => &mut self.closed,
            Outcome::Lost => &mut self.lost,
            Outcome::Failed => &mut self.failed,
        };
        *count += 1;
    }
}

impl Reconciler {
    pub(crate) async fn pass(&self, node: &Node) -> Result<ReconcilerPass, StoreError> {
        let (recovery, names, keys) = (node.recovery()?, self.names()?, node.key_logging());
        let (mut pass, mut failure) = (ReconcilerPass::default(), None);
        let (mut running, mut some_left) = (JoinSet::new(), true);
        loop {
            let free = self.free_beside(running.len());
            if some_left && free > 0 && !node.tasks.is_draining() {
                // As many as can be looked up immediately: the others stay free for other nodes.
                let taken_at = Instant::now();
                let taken = recovery.take_dangling(&names, free, TERM).await.unwrap_or_else(|error| {
                    failure = Some(error);
                    Vec::new()
                });
                pass.taken += taken.len() as u64;
                some_left = taken.len() == free as usize;
                for intent in taken {
                    let look_up = self.clone().look_up(Arc::clone(&recovery), intent, taken_at, keys);
                    running.spawn(subscribed(look_up));
                }
            }
            let Some(ended) = running.join_next().await else { break };
            pass.count(ended.unwrap_or(Outcome::Failed));
            // All that have ended, so that one call takes the next ones.
            while let Some(ended) = running.try_join_next() {
                pass.count(ended.unwrap_or(Outcome::Failed));
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        pass.overlooked = self.count_overlooked(node, &*recovery, names).await;
        // Without the feature, the query would be made in vain.
        if metrics::ENABLED
            && let Ok(counts) = recovery.count_intents().await
        {
            metrics::intents(
                counts.open,
                counts.dangling,
                counts.need_attention,
                counts.oldest.unwrap_or_default(),
            );
        }
        Ok(pass)
    }

    /// The number of look-ups that may begin.
    fn free_beside(&self, running: usize) -> u32 {
        let running = u32::try_from(running).unwrap_or(u32::MAX);
        self.settings.concurrency.saturating_sub(running).min(self.settings.batch)
    }

    /// Counts the overdue intents that no reconciler of this process looks up. Reports each name
    /// once.
    async fn count_overlooked(
        &self,
        node: &Node,
        recovery: &dyn RecoveryStore,
        mut names: Vec<String>,
    ) -> u64 {
        names.extend(node.lookups.names());
        let overdue = self.settings.overlooked_after;
        // The next pass tries again.
        let counts = recovery.count_overlooked(&names, overdue, MOST_OVERLOOKED).await.unwrap_or_default();
        for Overlooked { name, intents } in &counts {
            if node.lookups.is_first_report(name) {
                tracing::error!(
                    target: TRACING_TARGET, intent = name, intents, ?overdue,
                    "calls whose outcome is unknown are looked up by no process, and their keys may stay \
                     held: register a look-up for intents of this name with Reconciler::on, or resolve them \
                     by hand"
                );
            }
        }
        let overlooked = counts.iter().map(|counted| counted.intents).sum();
        metrics::overlooked(overlooked);
        overlooked
    }

    async fn look_up(
        self,
        recovery: Arc<dyn RecoveryStore>,
        intent: Intent,
        taken_at: Instant,
        keys: KeyLogging,
    ) -> Outcome {
        let (recovery, intent) = (&*recovery, Arc::new(intent));
        let decision = match self.settings.without_asking(&intent) {
            Some(decision) => decision,
            None => match self.ask_while_taken(recovery, &intent, taken_at).await {
                Ok(lookup) => self.settings.decide(&intent, lookup),
                Err(outcome) => return outcome,
            },
        };
        let outcome = match record(recovery, &intent, &decision).await {
            Ok(Fenced::Applied) => decision.outcome,
            Ok(Fenced::Lost) => Outcome::Lost,
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET, intent = intent.name, upstream_key = %intent.upstream_key,
                    error = &error as &dyn std::error::Error,
                    "a look-up could not be recorded; the intent is looked up again later"
                );
                Outcome::Failed
            }
        };
        log(&intent, outcome, &decision, keys);
        outcome
    }

    /// Asks, and keeps the intent from other nodes until there is an answer. An error if another
    /// node may have it.
    async fn ask_while_taken(
        &self,
        recovery: &dyn RecoveryStore,
        intent: &Arc<Intent>,
        taken_at: Instant,
    ) -> Result<Lookup, Outcome> {
        let mut asked = pin!(self.ask(intent));
        let mut extend_at = taken_at + EXTEND_AFTER;
        loop {
            if let Ok(answer) = timeout_at(extend_at, &mut asked).await {
                return Ok(answer.unwrap_or_else(|error| {
                    tracing::warn!(
                        target: TRACING_TARGET, intent = intent.name, upstream_key = %intent.upstream_key,
                        looks = intent.looks, error = &*error as &dyn std::error::Error,
                        "a look-up failed; the outcome of the call stays unknown"
                    );
                    Lookup::Unknown
                }));
            }
            // Not cut off by an answer: a write that arrives later would undo what was found.
            let began_at = Instant::now();
            match keep(recovery, intent).await {
                Ok(Fenced::Applied) => extend_at = began_at + EXTEND_AFTER,
                Ok(Fenced::Lost) => return Err(Outcome::Lost),
                Err(error) => {
                    tracing::warn!(
                        target: TRACING_TARGET, intent = intent.name, upstream_key = %intent.upstream_key,
                        error = &error as &dyn std::error::Error,
                        "a look-up is given up because the store failed; the intent is looked up again later"
                    );
                    return Err(Outcome::Failed);
                }
            }
        }
    }

    /// Calls the application's code in a task of its own, because it may panic.
    async fn ask(&self, intent: &Arc<Intent>) -> Result<Lookup, BoxError> {
        let upstream = self.upstreams.get(&intent.name).ok_or("no look-up is registered under this name")?;
        let (upstream, intent) = (Arc::clone(upstream), Arc::clone(intent));
        let asked = tokio::spawn(subscribed(async move { upstream.reconcile(&intent).await }));
        // A look-up changes nothing, so one that is too slow can be cut off.
        timeout(self.settings.timeout, AbortOnDropHandle::new(asked)).await??
    }
}

/// Takes an intent for another term, while it is looked up.
async fn keep(recovery: &dyn RecoveryStore, intent: &Intent) -> Result<Fenced, StoreError> {
    let update = IntentUpdate::LookAgain { after: TERM, absences: intent.absences };
    let (key, fence) = (intent.upstream_key, intent.lookup_fence());
    let extend = || recovery.update_intent(key, fence, &update, None);
    retry_until(Instant::now() + TO_RECORD, Backoff::new(PAUSE, PAUSE), extend, |_| {}).await
}

/// Records the decision, unless the intent was called again, settled or looked up by others in the
/// meantime.
async fn record(
    recovery: &dyn RecoveryStore,
    intent: &Intent,
    decision: &Decision,
) -> Result<Fenced, StoreError> {
    let give_up = Instant::now() + TO_RECORD;
    let (key, fence, attention) = (intent.upstream_key, intent.lookup_fence(), decision.attention.as_deref());
    let may_be_recorded = AtomicBool::new(false);
    let update = || recovery.update_intent(key, fence, &decision.update, attention);
    let recorded = retry_until(give_up, Backoff::new(PAUSE, PAUSE), update, |error| {
        may_be_recorded.fetch_or(error.kind() == StoreErrorKind::Ambiguous, Ordering::Relaxed);
    });
    if recorded.await? == Fenced::Applied {
        return Ok(Fenced::Applied);
    }
    // After a lost reply the fence fails because of the own update: then it was applied.
    let own = may_be_recorded.into_inner()
        && recovery.get_intent(key).await?.is_some_and(|found| is_recorded(&found, intent, &decision.update));
    Ok(if own { Fenced::Applied } else { Fenced::Lost })
}

/// Returns `true` if the intent is as the update makes it.
fn is_recorded(found: &Intent, taken: &Intent, update: &IntentUpdate) -> bool {
    let says_so = match (update, &found.state) {
        (IntentUpdate::Finalize(resource), IntentState::Finalized(recorded)) => resource == recorded,
        (IntentUpdate::Absent(_), IntentState::Dead { absent, .. }) => *absent,
        _ => false,
    };
    says_so && (found.call, found.takes) == (taken.call, taken.takes)
}

fn log(intent: &Intent, outcome: Outcome, decision: &Decision, keys: KeyLogging) {
    let (name, key, consumer) = (&intent.name, intent.upstream_key, &intent.consumer);
    match (outcome, &decision.attention, &decision.update) {
        (Outcome::Again, _, IntentUpdate::LookAgain { after, absences }) => {
            tracing::info!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer,
                key = %keys.shown(&intent.key), attempt = %intent.attempt, looks = intent.looks, absences,
                next_after = ?after,
                "a look-up has not settled its intent; it is looked up again"
            );
        }
        (Outcome::TurnedUp, _, IntentUpdate::Finalize(resource)) => {
            report_turned_up(intent, resource);
        }
        (Outcome::Attention, Some(what), _) => {
            tracing::error!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer, what,
                "an intent needs attention: an operator must resolve it"
            );
        }
        (Outcome::Found | Outcome::Absent, ..) => {
            tracing::info!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer,
                outcome = outcome.label(),
                "a dangling intent is settled"
            );
        }
        _ => {
            tracing::debug!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer,
                outcome = outcome.label(),
                "an intent was looked up"
            );
        }
    }
}

/// The time for which a write is tried again. With the time to the next extension, it is shorter
/// than the term: what was found is recorded while the intent is taken.
const TO_RECORD: Duration = Duration::from_secs(15);

/// The pause between two tries of a write.
const PAUSE: Duration = Duration::from_secs(1);

/// The number of overlooked intents that one pass counts.
const MOST_OVERLOOKED: u32 = 1000;
