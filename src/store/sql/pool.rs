//! The pool of a store's own, beside the pool that the application gave.

use std::{
    cell::Cell,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sqlx::{
    Connection, Database, Pool,
    pool::{PoolConnection, PoolOptions},
};

/// The connect options of a database.
pub(in crate::store) type ConnectOptionsOf<DB> = <<DB as Database>::Connection as Connection>::Options;

/// A pool that is opened at its first use, and again at the first use after it was closed.
///
/// It has the connect options of the given pool at any moment, so that a password may change. It
/// closes with the given pool. Its permits are its own: those of the given pool may be a part of
/// another pool's, as in `#[sqlx::test]`.
pub(in crate::store) struct OwnPool<DB: Database>(Arc<Place<DB>>);

struct Place<DB: Database> {
    open: Mutex<Option<Open<DB>>>,
    /// Held while a pool closes, so that another call to close waits for it.
    closing: tokio::sync::Mutex<()>,
    /// The pool that closes before this one.
    before: Option<OwnPool<DB>>,
}

struct Open<DB: Database> {
    pool: Pool<DB>,
    /// The options of the given pool from which those of `pool` were made.
    followed: Arc<ConnectOptionsOf<DB>>,
}

/// The way in which a pool is made from the given one.
pub(in crate::store) struct Recipe<'a, DB: Database, P, C> {
    pub(in crate::store) base: &'a Pool<DB>,
    pub(in crate::store) max_connections: u32,
    pub(in crate::store) pool_options: P,
    pub(in crate::store) connect_options: C,
}

/// A connection, and `true` if nothing has used it before.
pub(in crate::store) type Acquired<DB> = (PoolConnection<DB>, bool);

impl<DB: Database> OwnPool<DB> {
    fn new(before: Option<Self>) -> Self {
        Self(Arc::new(Place { open: Mutex::default(), closing: tokio::sync::Mutex::default(), before }))
    }

    /// Makes a pool that closes after another one.
    #[cfg(feature = "sqlite")]
    pub(in crate::store) fn closing_after(other: &Self) -> Self {
        Self::new(Some(other.clone()))
    }

    /// Takes a connection. Hooks of the given pool have run on a fresh one, and may have changed
    /// its settings.
    pub(in crate::store) async fn acquire<P, C>(
        &self,
        recipe: &Recipe<'_, DB, P, C>,
    ) -> Result<Acquired<DB>, sqlx::Error>
    where
        P: Fn(PoolOptions<DB>) -> PoolOptions<DB>,
        C: Fn(ConnectOptionsOf<DB>) -> ConnectOptionsOf<DB>,
    {
        loop {
            let pool = self.open(recipe);
            let acquired = USED.scope(Cell::new(false), async {
                let connection = pool.acquire().await?;
                Ok((connection, !USED.with(Cell::get)))
            });
            match acquired.await {
                // Closed while this call waited: the next one opens another pool.
                Err(sqlx::Error::PoolClosed) => {}
                acquired => return acquired,
            }
        }
    }

    /// Takes a connection that is idle, if there is one.
    #[cfg(feature = "postgres")]
    pub(in crate::store) fn try_acquire(&self) -> Option<PoolConnection<DB>> {
        self.0.open().as_ref().and_then(|open| open.pool.try_acquire())
    }

    /// Returns `true` if another connection may be opened.
    #[cfg(feature = "postgres")]
    pub(in crate::store) fn has_room(&self) -> bool {
        let size = |open: &Open<DB>| open.pool.size() < open.pool.options().get_max_connections();
        self.0.open().as_ref().is_none_or(size)
    }

    /// Closes the connections: the idle ones first, the others when their calls have ended. If the
    /// future is dropped, those close without it.
    pub(in crate::store) async fn close(&self) {
        self.0.close().await;
    }

    fn open<P, C>(&self, recipe: &Recipe<'_, DB, P, C>) -> Pool<DB>
    where
        P: Fn(PoolOptions<DB>) -> PoolOptions<DB>,
        C: Fn(ConnectOptionsOf<DB>) -> ConnectOptionsOf<DB>,
    {
        let given = recipe.base.connect_options();
        let connect_options = || (recipe.connect_options)(given.as_ref().clone());
        let mut place = self.0.open();
        match &mut *place {
            Some(open) => {
                if !Arc::ptr_eq(&open.followed, &given) {
                    open.pool.set_connect_options(connect_options());
                    open.followed = given;
                }
                open.pool.clone()
            }
            None => {
                let pool = recipe.pool().connect_lazy_with(connect_options());
                *place = Some(Open { pool: pool.clone(), followed: given });
                self.close_with(recipe.base);
                pool
            }
        }
    }

    fn close_with(&self, base: &Pool<DB>) {
        if base.is_closed() {
            return;
        }
        let (closed, place) = (base.close_event(), Arc::downgrade(&self.0));
        tokio::spawn(async move {
            closed.await;
            if let Some(place) = place.upgrade() {
                place.close().await;
            }
        });
    }
}

impl<DB: Database, P, C> Recipe<'_, DB, P, C>
where
    P: Fn(PoolOptions<DB>) -> PoolOptions<DB>,
{
    /// Returns the options of the given pool without those that serve its borrowers: a test or a
    /// hook at every use would cost each call a round trip.
    fn pool(&self) -> PoolOptions<DB> {
        let connections = self.max_connections.max(1);
        // A pool takes its permits from its parent, and a parent cannot be removed. This one has
        // permits and no connections.
        let permits = PoolOptions::new()
            .max_connections(connections)
            .max_lifetime(None)
            .idle_timeout(None)
            .connect_lazy_with(self.base.connect_options().as_ref().clone());
        let options = self.base.options().clone().parent(permits);
        (self.pool_options)(
            options
                .min_connections(0)
                .max_connections(connections)
                .test_before_acquire(false)
                .before_acquire(|_, _| {
                    // sqlx calls this for connections that were used before, and for no others.
                    USED.with(|used| used.set(true));
                    Box::pin(async { Ok(true) })
                })
                .after_release(|_, _| Box::pin(async { Ok(true) })),
        )
    }
}

impl<DB: Database> Default for OwnPool<DB> {
    fn default() -> Self {
        Self::new(None)
    }
}

impl<DB: Database> Clone for OwnPool<DB> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<DB: Database> fmt::Debug for OwnPool<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connections = self.0.open().as_ref().map_or(0, |open| open.pool.size());
        write!(f, "{connections} connections")
    }
}

impl<DB: Database> Place<DB> {
    fn open(&self) -> MutexGuard<'_, Option<Open<DB>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn close(&self) {
        if let Some(before) = &self.before {
            Box::pin(before.close()).await;
        }
        let _closing = self.closing.lock().await;
        let Some(Open { pool, .. }) = self.open().take() else { return };
        // One by one, because sqlx closes the idle ones only when all have been given back.
        while let Some(connection) = pool.try_acquire() {
            // The connection is gone even if the other side did not hear of it.
            let _ = connection.close().await;
        }
        pool.close().await;
    }
}

tokio::task_local! {
    /// Set while a connection is acquired.
    static USED: Cell<bool>;
}
