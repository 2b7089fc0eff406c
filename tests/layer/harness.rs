//! The tests' own tools do what they say.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use crate::support::{
    http::{Client, RawConnection, exchange, request},
    postgres::Postgres,
    proxy::{Fault, Proxy},
    required_env,
    server::Server,
};

#[tokio::test]
async fn a_proxy_passes_bytes_and_the_end_on() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (mut from, mut to) = stream.split();
    let mut echoed = vec![0; bytes.len()];
    let (sent, read) = tokio::join!(to.write_all(&bytes), from.read_exact(&mut echoed));
    sent.unwrap();
    read.unwrap();
    assert_eq!(echoed, bytes);
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    proxy.until(|counts| counts.open == 0).await;
    assert_eq!(proxy.counts().accepted, 1);
}

#[tokio::test]
async fn a_proxy_delays_replies() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    proxy.set(Fault::DelayReplies(Duration::from_millis(200)));
    let start = Instant::now();
    assert_eq!(say(&mut stream, b"one").await.as_deref(), Some(&b"one"[..]));
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn a_proxy_holds_requests_from_some_bytes_on() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    proxy.set(Fault::HoldRequestsFrom(b"two"));
    assert_eq!(say(&mut stream, b"one").await.as_deref(), Some(&b"one"[..]));
    assert_eq!(say(&mut stream, b"two").await, None);
    assert_eq!(say(&mut stream, b"one").await, None);
    proxy.until(|counts| counts.withheld == 1).await;
    proxy.set(Fault::None);
    let mut replies = [0; 6];
    stream.read_exact(&mut replies).await.unwrap();
    assert_eq!(&replies, b"twoone");
}

#[tokio::test]
async fn a_proxy_that_cuts_loses_what_it_held_whatever_is_set_then() {
    for fault in [Fault::HoldRequestsFrom(b"one"), Fault::HoldRepliesFrom(b"one")] {
        for _ in 0..100 {
            let proxy = Proxy::start(echo().await);
            let mut stream = connect(&proxy).await;
            proxy.set(fault.clone());
            stream.write_all(b"one").await.unwrap();
            proxy.until(|counts| counts.withheld == 1).await;
            proxy.cut();
            proxy.set(Fault::None);
            assert!(stream.read(&mut [0]).await.is_err());
        }
    }
}

#[tokio::test]
async fn a_proxy_holds_replies_and_passes_them_on_in_order() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    proxy.set(Fault::HoldReplies);
    assert_eq!(say(&mut stream, b"one").await, None);
    assert_eq!(say(&mut stream, b"two").await, None);
    proxy.until(|counts| counts.withheld == 1).await;
    proxy.set(Fault::None);
    let mut replies = [0; 6];
    stream.read_exact(&mut replies).await.unwrap();
    assert_eq!(&replies, b"onetwo");
    assert_eq!(proxy.counts().withheld, 0);
}

#[tokio::test]
async fn a_proxy_holds_replies_from_a_request_on() {
    let proxy = Proxy::start(echo().await);
    let (mut stream, mut other) = (connect(&proxy).await, connect(&proxy).await);
    proxy.set(Fault::HoldRepliesFrom(b"COMMIT"));
    assert!(say(&mut stream, b"BEGIN").await.is_some());
    assert!(say(&mut stream, b"a COMMIT").await.is_none());
    assert!(say(&mut other, b"BEGIN").await.is_some());
    proxy.until(|counts| counts.withheld == 1).await;
    proxy.cut();
    assert!(stream.read(&mut [0]).await.is_err());
    proxy.until(|counts| counts.open == 0 && counts.withheld == 0).await;
}

#[tokio::test]
async fn a_proxy_refuses_new_connections_and_keeps_open_ones() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    assert!(say(&mut stream, b"one").await.is_some());
    for _ in 0..3 {
        proxy.set(Fault::Refuse);
        let refused = async {
            while TcpStream::connect(proxy.address()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(5), refused).await.unwrap();
        assert!(say(&mut stream, b"two").await.is_some());
        proxy.set(Fault::None);
        let accepted = async {
            while TcpStream::connect(proxy.address()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(5), accepted).await.unwrap();
    }
}

#[tokio::test]
async fn a_proxy_loses_bytes_in_silence() {
    let proxy = Proxy::start(echo().await);
    let mut stream = connect(&proxy).await;
    proxy.set(Fault::LoseRepliesAfter(2));
    assert_eq!(say(&mut stream, b"one").await.as_deref(), Some(&b"on"[..]));
    assert_eq!(say(&mut stream, b"two").await, None);
    proxy.until(|counts| counts.withheld == 1).await;
    proxy.set(Fault::LoseRequestsAfter(4));
    assert_eq!(say(&mut stream, b"three").await.as_deref(), Some(&b"thre"[..]));
    assert_eq!(say(&mut stream, b"four").await, None);
    proxy.set(Fault::None);
    assert_eq!(say(&mut stream, b"five").await.as_deref(), Some(&b"five"[..]));
    assert_eq!(proxy.counts().withheld, 0);
}

#[tokio::test]
async fn the_raw_client_shows_every_byte() {
    let address = canned(
        b"HTTP/1.1 201 Created\r\nX-One: 1\r\nx-raw:  \xff \r\nx-one:\r\ncontent-length: 2\r\n\r\nok\
          HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
          3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nx-sum: 5\r\n\r\n\
          HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n\
          HTTP/1.1 204 No Content\r\n\r\n\
          HTTP/1.0 200 OK\r\n\r\nto the end",
    )
    .await;
    let mut connection = RawConnection::open(address).await;
    connection.send(request("GET", "/", &[("x", "y")], "")).await;
    let first = connection.read().await;
    assert_eq!((first.status, first.text()), (201, "ok"));
    let names: Vec<&[u8]> = first.headers.iter().map(|(name, _)| name.as_slice()).collect();
    assert_eq!(names, [&b"X-One"[..], b"x-raw", b"x-one", b"content-length"]);
    assert_eq!((first.values("x-one"), first.values("X-RAW")), (vec![&b"1"[..], b""], vec![&b"\xff"[..]]));
    let second = connection.read().await;
    assert_eq!(
        (second.text(), &*second.trailers),
        ("abc0123456789", &[(b"x-sum".to_vec(), b"5".to_vec())][..])
    );
    assert_eq!(connection.read_head().await.header("content-length"), Some("5"));
    assert_eq!(connection.read().await.status, 204);
    assert_eq!(connection.read().await.text(), "to the end");
}

#[tokio::test]
async fn hypers_clients_speak_both_versions() {
    let app = axum::Router::new()
        .fallback(|request: axum::extract::Request| async move { format!("{:?}", request.version()) });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async { axum::serve(listener, app).await });
    for (mut client, version) in
        [(Client::http1(address).await, "HTTP/1.1"), (Client::http2(address).await, "HTTP/2.0")]
    {
        let request = hyper::Request::post(format!("http://{address}/")).body("x".into()).unwrap();
        assert_eq!(client.send(request).await.into_body().to_bytes(), version);
    }
    assert_eq!(exchange(address, request("POST", "/", &[], "x")).await.text(), "HTTP/1.1");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_of_its_own_crashes_comes_back_and_freezes() {
    let server = Postgres::start();
    let patience = Duration::from_secs(1);
    let pool =
        sqlx::postgres::PgPoolOptions::new().acquire_timeout(patience).connect(&server.url()).await.unwrap();
    sqlx::query("CREATE TABLE kept (id int)").execute(&pool).await.unwrap();
    server.stop_immediate();
    assert!(sqlx::query("SELECT * FROM kept").execute(&pool).await.is_err());
    server.start_again();
    sqlx::query("SELECT * FROM kept").execute(&pool).await.unwrap();
    server.pause();
    let mut frozen = std::pin::pin!(sqlx::query("SELECT 1").execute(&pool));
    assert!(timeout(Duration::from_millis(300), &mut frozen).await.is_err());
    server.resume();
    frozen.await.unwrap();
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_frozen_server_can_be_dropped() {
    let server = Postgres::start_with(&["max_connections=7"]);
    let pool = sqlx::PgPool::connect(&server.url()).await.unwrap();
    let most: String = sqlx::query_scalar("SHOW max_connections").fetch_one(&pool).await.unwrap();
    assert_eq!(most, "7");
    server.pause();
    let address = server.address();
    drop(server);
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn the_example_server_is_killed_frozen_and_ended() {
    let mut server = Server::start(None, &[]);
    let first = server.charge("/charges", "key").await;
    assert_eq!((first.status, first.header("idempotent-replayed")), (201, None));
    server.kill9();
    server.start_again();
    let retry = server.charge("/charges", "key").await;
    assert_eq!((retry.header("idempotent-replayed"), &retry.body), (Some("true"), &first.body));
    server.stop();
    let mut frozen = Box::pin(server.get("/charges", &[]));
    assert!(timeout(Duration::from_millis(300), &mut frozen).await.is_err());
    server.cont();
    assert_eq!(frozen.await.json().as_array().unwrap().len(), 1);
    assert_eq!(server.get("/charges", &[("x-api-key", "globex-key")]).await.text(), "[]");
    assert!(server.sqlite_file().exists());
    assert!(server.terminate().success(), "{}", server.log());
}

#[tokio::test]
async fn the_example_server_ends_after_the_requests_whose_clients_have_left() {
    let mut server = Server::start(None, &[]);
    let mut client = RawConnection::open(server.address()).await;
    let headers =
        [("x-api-key", "acme-key"), ("idempotency-key", "key"), ("content-type", "application/json")];
    let body = r#"{"amount":1,"currency":"usd"}"#;
    client.send(request("POST", "/charges?delay_ms=1000", &headers, body)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    client.reset();
    assert!(server.terminate().success(), "{}", server.log());
    server.start_again();
    let retry = server.post("/charges?delay_ms=1000", &headers[1..2], body).await;
    assert_eq!((retry.status, retry.header("idempotent-replayed")), (201, Some("true")));
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn the_example_server_runs_on_postgres() {
    for variable in ["TEST_POSTGRES_URL", "TEST_PGBOUNCER_URL"] {
        sqlx::PgPool::connect(&required_env(variable)).await.unwrap();
    }
    let database = Postgres::start();
    let proxy = Proxy::start(database.address());
    let server = Server::start(Some(&database.url_through(proxy.address())), &[("LEASE_MS", "1000")]);
    assert_eq!(server.charge("/charges", "key").await.status, 201);
    assert_eq!(server.charge("/charges", "key").await.header("idempotent-replayed"), Some("true"));
    assert!(proxy.counts().open > 0);
}

async fn connect(proxy: &Proxy) -> TcpStream {
    TcpStream::connect(proxy.address()).await.unwrap()
}

/// What comes back within 300 ms.
async fn say(stream: &mut TcpStream, bytes: &[u8]) -> Option<Vec<u8>> {
    stream.write_all(bytes).await.unwrap();
    let mut buffer = vec![0; 1024];
    let read = timeout(Duration::from_millis(300), stream.read(&mut buffer)).await.ok()?.unwrap();
    Some(buffer[..read].to_vec())
}

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    address
}

/// A server that sends these bytes to whoever sends anything, and closes.
async fn canned(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0);
        stream.write_all(bytes).await.unwrap();
    });
    address
}
