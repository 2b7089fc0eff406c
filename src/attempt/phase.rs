//! Phases: recovery points of a request.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Connection, Database};
use tokio::{runtime::Handle, task::JoinHandle, time::timeout};

use crate::{
    attempt::{Facts, error::IntentError, idempotency::Idempotency, progress::InPhase, tx_error::TxError},
    error::StoreError,
    store::{
        sql::slot::{Last, Slot},
        transaction::{StoreTransaction, TransactionError, TransactionErrorKind},
    },
};

impl Idempotency {
    /// Sets a recovery point: runs a step of local work in a transaction of its own and records its
    /// result in that same transaction. A later attempt of the request gets the result, without the
    /// step.
    ///
    /// Calls to upstream services between phases are [intents](Self::intent). So a handler is one
    /// straight line that may run again from its beginning:
    ///
    /// ```
    /// # #[cfg(all(feature = "axum", feature = "postgres"))] {
    /// # use sqlx::PgConnection;
    /// # use tower_idempotency::{CallFailure, Idempotency, Resource, TxError, UpstreamKey};
    /// # async fn transfer(key: UpstreamKey) -> Result<Resource, CallFailure> {
    /// #     Ok(Resource::new("tr_1"))
    /// # }
    /// async fn pay_out(idempotency: Idempotency) -> Result<String, TxError> {
    ///     let payout: i64 = idempotency
    ///         .phase("create", async |tx: &mut PgConnection| {
    ///             let insert = "INSERT INTO payouts (cents) VALUES (1000) RETURNING id";
    ///             sqlx::query_scalar(insert).fetch_one(tx).await.map_err(TxError::from)
    ///         })
    ///         .await?;
    ///     let intent = idempotency.intent("bank.transfer");
    ///     let transfer = intent.call(async |key| transfer(key).await).await?;
    ///     idempotency
    ///         .phase("finish", async |tx: &mut PgConnection| {
    ///             let update = sqlx::query("UPDATE payouts SET transfer = $1 WHERE id = $2");
    ///             update.bind(&transfer.id).bind(payout).execute(tx).await?;
    ///             Ok::<_, TxError>(())
    ///         })
    ///         .await?;
    ///     Ok(transfer.id)
    /// }
    /// # }
    /// ```
    ///
    /// The step gets a connection of the store's database (`&mut PgConnection`, on SQLite `&mut
    /// SqliteConnection`) in a transaction that begins as that of [`Tx`](crate::Tx) does: on
    /// PostgreSQL in the application's pool, with the same options and limits. The step must not
    /// end it. If the step fails, its writes are rolled back, and its error returned. If it
    /// succeeds, its writes stay, whatever becomes of the request.
    ///
    /// The result is stored as JSON, and returned as it is read from there: what is not written
    /// (`#[serde(skip)]`) is lost in the first attempt too. A result that cannot be read again is
    /// refused before anything is committed. A later attempt finds it by the name: change neither
    /// the name nor the form of the result while requests may be retried. Phases come one after the
    /// other, before the handler begins its `Tx`, and none inside another.
    ///
    /// # Errors
    ///
    /// The step's error, or a [`TxError`]:
    ///
    /// * the transaction could not begin or commit;
    /// * a name was used twice in this attempt, another phase or the handler's `Tx` is open, or the
    ///   result cannot be stored (`intent-misused`);
    /// * the store has no transactions of this database, as the `MemoryStore` has none
    ///   (`store-misconfigured`).
    pub async fn phase<C, T, E>(
        &self,
        name: impl Into<String>,
        step: impl AsyncFnOnce(&mut C) -> Result<T, E>,
    ) -> Result<T, E>
    where
        C: Connection,
        C::Database: Database<Connection = C>,
        T: Serialize + DeserializeOwned,
        E: From<TxError>,
    {
        let name = name.into();
        let _open = self.enter_phase(&name).map_err(TxError::from)?;
        if let Some(result) = self.finished_phase(&name).await.map_err(TxError::from)? {
            return Ok(serde_json::from_slice(&result).map_err(TxError::unreadable_phase)?);
        }
        let phase = Phase { idempotency: self, name, slot: Some(self.phase_slot::<C::Database>()?) };
        phase.run(step).await
    }

    fn enter_phase(&self, name: &str) -> Result<InPhase, IntentError> {
        self.enter_run()?;
        self.refuse_inside_transaction()?;
        self.facts.progress.enter_phase(name)
    }

    /// The result of a phase that is finished. The store waits for a transaction of the phase that
    /// is being committed.
    async fn finished_phase(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let Facts { node, settings, attempt, record_id, .. } = &*self.facts;
        let (recovery, attempt, record) = (node.recovery()?, attempt.clone(), *record_id);
        let name = name.to_owned();
        let find = async move { recovery.find_phase(&attempt, record, &name).await };
        node.tasks.call(settings.store_wait(), find).await
    }

    fn phase_slot<DB: Database>(&self) -> Result<Arc<Slot<DB>>, TxError> {
        let slot = self.facts.offered.get::<Arc<Slot<DB>>>();
        slot.map(|slot| slot.again()).ok_or_else(TxError::no_store)
    }
}

/// A running phase. Dropped, it is rolled back.
struct Phase<'a, DB: Database> {
    idempotency: &'a Idempotency,
    name: String,
    slot: Option<Arc<Slot<DB>>>,
}

impl<DB: Database> Phase<'_, DB> {
    async fn run<T, E>(mut self, step: impl AsyncFnOnce(&mut DB::Connection) -> Result<T, E>) -> Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<TxError>,
    {
        let Some(slot) = self.slot.clone() else { return Err(TxError::no_store().into()) };
        let mut tx = Arc::clone(&slot).lend().await.map_err(TxError::from)?;
        let done = slot.within_time_limit(step(&mut tx)).await;
        drop(tx);
        let done = match done {
            Ok(result) => result.and_then(|result| stored_form(&result).map_err(E::from)),
            Err(error) => Err(TxError::from(Arc::new(error)).into()),
        };
        if done.is_err() {
            self.roll_back().await;
        }
        let (bytes, result) = done?;
        self.slot = None;
        self.finish(slot, bytes).await.map_err(|error| TxError::from(Arc::new(error)))?;
        Ok(result)
    }

    /// Waits for the rollback, for as long as the next step may wait.
    async fn roll_back(&mut self) {
        if let Some(task) = self.start_roll_back() {
            let _ = timeout(self.idempotency.facts.settings.store_wait(), task).await;
        }
    }

    fn start_roll_back(&mut self) -> Option<JoinHandle<Result<(), TransactionError>>> {
        let slot = self.slot.take()?;
        // Without a runtime the connection is closed, which rolls back too.
        Handle::try_current().is_ok().then(|| self.run_to_end(async move { slot.roll_back().await }))
    }

    /// Ends the transaction in a task that goes on when the handler is dropped. The end of the
    /// attempt waits for it: if the step has ended its transaction itself, the key is held.
    fn run_to_end(
        &self,
        end: impl Future<Output = Result<(), TransactionError>> + Send + 'static,
    ) -> JoinHandle<Result<(), TransactionError>> {
        let progress = Arc::clone(&self.idempotency.facts.progress);
        let noting = {
            let progress = Arc::clone(&progress);
            async move {
                let ended = end.await;
                if let Err(error) = &ended
                    && error.kind() == TransactionErrorKind::Ended
                {
                    progress.hold(error.kind().rejection());
                }
                ended
            }
        };
        self.idempotency.facts.node.tasks.spawn(progress.track(noting))
    }

    async fn finish(&self, slot: Arc<Slot<DB>>, result: Bytes) -> Result<(), TransactionError> {
        let limit = self.idempotency.facts.settings.settle_wait();
        let last = Last::Phase { name: self.name.clone(), result };
        let task = self.run_to_end(async move { slot.finish(last).await });
        let finished = match timeout(limit, task).await {
            Ok(finished) => finished.unwrap_or_else(|error| Err(unconfirmed().with_source(error))),
            Err(elapsed) => Err(unconfirmed().with_source(elapsed)),
        };
        match finished {
            Err(error) if error.kind() == TransactionErrorKind::Unconfirmed => self.resolve(error).await,
            finished => finished,
        }
    }

    /// Asks the store, which waits until the transaction has come to its end.
    async fn resolve(&self, error: TransactionError) -> Result<(), TransactionError> {
        match self.idempotency.finished_phase(&self.name).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                let message = "the phase was not committed";
                Err(TransactionError::new(TransactionErrorKind::Lost, message).with_source(error))
            }
            Err(_) => Err(error),
        }
    }
}

impl<DB: Database> Drop for Phase<'_, DB> {
    fn drop(&mut self) {
        self.start_roll_back();
    }
}

/// The bytes of a result, and the result as a later attempt reads it.
fn stored_form<T: Serialize + DeserializeOwned>(result: &T) -> Result<(Bytes, T), TxError> {
    let bytes = serde_json::to_vec(result).map_err(TxError::unstorable_phase)?;
    let result = serde_json::from_slice(&bytes).map_err(TxError::unstorable_phase)?;
    Ok((bytes.into(), result))
}

fn unconfirmed() -> TransactionError {
    let message = "it is not known yet whether the phase was committed";
    TransactionError::new(TransactionErrorKind::Unconfirmed, message)
}
