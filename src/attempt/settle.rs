//! Writes of intents, in tasks that are not cancelled.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    error::StoreError,
    metrics,
    node::{
        FIRST_LATE_PAUSE, Node, RETRY, UNDO_LIMIT,
        errand::{receive, repeat_while},
        tasks::no_answer,
    },
    redact::TRACING_TARGET,
    retry::retry_until,
    store::recovery::RecoveryStore,
    stored::{
        intent::{
            Intent, IntentFence, IntentState, IntentUpdate, OpenOutcome, Opening, Resource, UpstreamKey,
        },
        record::Fenced,
    },
};

impl Node {
    /// Opens an intent, waiting at most `limit`. An intent that is opened later is withdrawn, as
    /// not sent.
    pub(super) async fn open_intent(
        self: &Arc<Self>,
        opening: Opening,
        limit: Duration,
    ) -> Result<OpenOutcome, StoreError> {
        let recovery = self.recovery()?;
        let (sender, receiver) = oneshot::channel::<Delivery>();
        self.tasks.spawn(Arc::clone(self).open_for(recovery, opening, sender));
        let delivery = receive(receiver, limit).await;
        delivery.and_then(Delivery::accept).unwrap_or_else(|| Err(no_answer(limit)))
    }

    async fn open_for(
        self: Arc<Self>,
        recovery: Arc<dyn RecoveryStore>,
        opening: Opening,
        caller: oneshot::Sender<Delivery>,
    ) {
        let open_once = async || self.replays.note(recovery.open_intent(&opening).await);
        let (outcome, may_arrive_late) = repeat_while(|| !caller.is_closed(), open_once).await;
        // If the handler has gone, the delivery is dropped here, which withdraws the intent.
        let _ = caller.send(Delivery { node: self, opening, may_arrive_late, outcome: Some(outcome) });
    }

    /// Records that no call was made. Tries for a while: an opening that had no answer may be
    /// carried out late.
    async fn withdraw(self: Arc<Self>, opening: Opening, may_arrive_late: bool) {
        let (fence, until) = (IntentFence::Call(opening.call), Instant::now() + LATE);
        let mut pause = FIRST_LATE_PAUSE;
        loop {
            let give_up = Instant::now() + UNDO_LIMIT;
            match self.settle_until(opening.upstream_key, fence, IntentUpdate::NotSent, give_up).await {
                Ok(Fenced::Lost) if may_arrive_late && Instant::now() < until => {
                    let _ = timeout(pause, self.tasks.draining.cancelled()).await;
                    if self.tasks.is_draining() {
                        return;
                    }
                    pause *= 2;
                }
                Ok(Fenced::Lost | Fenced::Applied) => return,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(
                        target: TRACING_TARGET, error,
                        "an intent without a call stays open until it is reconciled"
                    );
                    return;
                }
            }
        }
    }

    /// Records the outcome of a call, trying again until `give_up`.
    pub(super) fn settle_intent(
        self: &Arc<Self>,
        intent: UpstreamKey,
        fence: IntentFence,
        update: IntentUpdate,
        give_up: Instant,
    ) -> JoinHandle<Result<Fenced, StoreError>> {
        let this = Arc::clone(self);
        self.tasks.spawn(async move { this.settle_until(intent, fence, update, give_up).await })
    }

    async fn settle_until(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: IntentUpdate,
        give_up: Instant,
    ) -> Result<Fenced, StoreError> {
        let settle_once = async || self.replays.note(self.settle_once(intent, fence, &update).await);
        retry_until(give_up, RETRY, settle_once, |error| {
            let error = error as &dyn std::error::Error;
            tracing::warn!(
                target: TRACING_TARGET, upstream_key = %intent, error,
                "the outcome of a call is not recorded yet; trying again"
            );
        })
        .await
    }

    /// Records the outcome. An intent that is settled already must say the same.
    async fn settle_once(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
    ) -> Result<Fenced, StoreError> {
        let recovery = self.recovery()?;
        if recovery.update_intent(intent, fence, update, None).await? == Fenced::Applied {
            return Ok(Fenced::Applied);
        }
        let (Some(found), IntentFence::Call(call)) = (recovery.get_intent(intent).await?, fence) else {
            return Ok(Fenced::Lost);
        };
        let resource = match (update, &found.state) {
            (IntentUpdate::Finalize(resource), IntentState::Finalized(recorded))
                if is_recorded_as(resource, recorded) =>
            {
                return Ok(Fenced::Applied);
            }
            (IntentUpdate::Refuse(_), IntentState::Dead { absent: false, .. }) if found.call == call => {
                return Ok(Fenced::Applied);
            }
            (IntentUpdate::Finalize(resource), _) => resource,
            (
                IntentUpdate::Refuse(_)
                | IntentUpdate::NotSent
                | IntentUpdate::Absent(_)
                | IntentUpdate::LookAgain { .. }
                | IntentUpdate::Close,
                _,
            ) => return Ok(Fenced::Lost),
        };
        let fenced = match turned_up(&found) {
            Some(fence) => recovery.update_intent(intent, fence, update, Some(TURNED_UP)).await?,
            None => Fenced::Lost,
        };
        match fenced {
            Fenced::Applied => report_turned_up(&found, resource),
            Fenced::Lost => tracing::error!(
                target: TRACING_TARGET, upstream_key = %intent, intent = found.name, resource = resource.id,
                "a resource was made that is not recorded: its intent was called again or settled otherwise \
                 meanwhile"
            ),
        }
        Ok(fenced)
    }
}

/// The fence for a resource that was unknown, whichever call has made it. No call may be under way,
/// and the next attempt would make one.
fn turned_up(found: &Intent) -> Option<IntentFence> {
    match found.state {
        IntentState::Dead { absent: true, .. } => Some(IntentFence::AbsentCall(found.call)),
        IntentState::Open { sent: false } => Some(IntentFence::Call(found.call)),
        IntentState::Open { sent: true }
        | IntentState::Dead { absent: false, .. }
        | IntentState::Finalized(_) => None,
    }
}

/// A database that cannot store NUL has a replacement character instead.
fn is_recorded_as(resource: &Resource, recorded: &Resource) -> bool {
    recorded.id == resource.id || recorded.id == resource.id.replace('\0', "\u{fffd}")
}

/// The outcome of an opening, on its way to the handler. If the handler is dropped before it looks,
/// no call is made, and an intent that may be open is withdrawn.
struct Delivery {
    node: Arc<Node>,
    opening: Opening,
    /// A try had no answer, and may be carried out after those that had one.
    may_arrive_late: bool,
    /// `None` once the handler has it.
    outcome: Option<Result<OpenOutcome, StoreError>>,
}

impl Delivery {
    fn accept(mut self) -> Option<Result<OpenOutcome, StoreError>> {
        let outcome = self.outcome.take();
        self.may_arrive_late &= !matches!(outcome, Some(Ok(OpenOutcome::Opened)));
        outcome
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let may_be_open = self.may_arrive_late || matches!(self.outcome, Some(Ok(OpenOutcome::Opened)));
        // Without a runtime the reconciler does it later.
        if may_be_open && let Ok(runtime) = Handle::try_current() {
            let withdrawal = Arc::clone(&self.node).withdraw(self.opening.clone(), self.may_arrive_late);
            self.node.tasks.spawn_on(withdrawal, &runtime);
        }
    }
}

/// Reports a resource whose intent was declared absent. Its call is not repeated.
pub(crate) fn report_turned_up(intent: &Intent, resource: &Resource) {
    let (name, key, consumer) = (&intent.name, intent.upstream_key, &intent.consumer);
    metrics::turned_up();
    tracing::error!(
        target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer, resource = resource.id,
        "{TURNED_UP}"
    );
}

pub(crate) const TURNED_UP: &str = "a resource turned up that the upstream had not known before";

/// The time in which an opening without an answer may still be carried out.
const LATE: Duration = Duration::from_secs(30);
