use crate::support::{app::consumer, db::Db, direct};
use axum::{
    Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use sqlx::{Postgres, Sqlite};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tower_idempotency::*;

#[derive(Clone, Default)]
struct Up(Arc<Mutex<Vec<(UpstreamKey, &'static str)>>>, Arc<Mutex<Vec<&'static str>>>);

async fn run<DB: Db>() {
    let home = DB::home().await;
    let pool = DB::pool(&home, 5);
    let store = DB::store(&pool);
    for dedup in [false, true] {
        for (script, expect) in [
            (vec!["ok"], vec![201, 201]),
            (vec!["ok", "500"], vec![500, 201]),
            (vec!["refused"], vec![422, 422]),
            (vec!["notsent"], vec![503, 201]),
            (vec!["unknown"], if dedup { vec![503, 201] } else { vec![409, 409] }),
        ] {
            let up = Up::default();
            let s2 = script.clone();
            *up.1.lock().unwrap() = s2;
            let u = up.clone();
            let handler = move |idem: Idempotency| {
                let up = u.clone();
                async move {
                    let mut b = idem.intent("transfer").with_arguments(&(1, 2));
                    if dedup {
                        b = b.deduplicates_for(Duration::from_secs(3600));
                    }
                    let r = b
                        .call(async |key| {
                            let what = if up.1.lock().unwrap().is_empty() {
                                "ok"
                            } else {
                                up.1.lock().unwrap().remove(0)
                            };
                            up.0.lock().unwrap().push((key, what));
                            match what {
                                "ok" => Ok(Resource::new("tr_1")),
                                "refused" => Err(CallFailure::refused("no")),
                                "notsent" => Err(CallFailure::not_sent("x")),
                                _ => Err(CallFailure::unknown("y")),
                            }
                        })
                        .await;
                    let after = {
                        let mut v = up.1.lock().unwrap();
                        if v.first() == Some(&"500") {
                            v.remove(0);
                            true
                        } else {
                            false
                        }
                    };
                    if after {
                        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
                    }
                    match r {
                        Ok(r) => (StatusCode::CREATED, r.id).into_response(),
                        Err(e) => e.into_response(),
                    }
                }
            };
            let layer = IdempotencyLayer::new(Arc::clone(&store));
            let app: Router = Router::new().route("/charges", post(handler)).layer(layer.clone());
            let key = uuid::Uuid::new_v4().to_string();
            let mut got = vec![];
            for _ in 0..2 {
                let a = direct::send(&app, direct::charge(&key)).await;
                println!("{script:?} {dedup} {:?} {:?}", a.status, a.body);
                got.push(a.status.as_u16());
            }
            println!(
                "{:?} {:?}",
                up.0.lock().unwrap(),
                layer.handle().get(&consumer(), &IdempotencyKey::new(&*key).unwrap()).await.unwrap()
            );
            assert_eq!(got, expect, "{script:?} {dedup}");
        }
    }
    let r = store.recovery().unwrap();
    for f in [IntentFilter::Open, IntentFilter::Dangling, IntentFilter::Dead, IntentFilter::NeedsAttention] {
        println!("{f:?} {:#?}", r.list_intents(f, 10).await.unwrap());
    }
    println!("{:?}", r.take_dangling(10, Duration::from_secs(1)).await.unwrap());
    println!("{:?}", r.take_abandoned(10, Duration::from_secs(1)).await.unwrap());
    println!("{:?}", r.list_requests(10).await.unwrap());
    println!("{:?}", r.purge_settled(Duration::from_secs(1), 10).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite() {
    run::<Sqlite>().await
}
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres() {
    run::<Postgres>().await
}
