//! The API of the application that the tests operate: counts in Redis, keeps in PostgreSQL, and ends as it should when it is asked to.
//!
//! `/hit` counts one and keeps it, `/count` says how many are kept, `/health` is 200 while both answer.

use std::{env, fs, io, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::Mutex,
};
use tokio_postgres::{Client, Config, NoTls};
use tokio_util::task::TaskTracker;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// For one request, whatever it needs.
const PATIENCE: Duration = Duration::from_secs(5);
/// For what is being answered when it is to end.
const LAST: Duration = Duration::from_secs(8);

struct Api {
    database: Config,
    redis: String,
    version: String,
    key: String,
    greeting: String,
    hostname: String,
    /// One connection, made anew when it is gone.
    client: Mutex<Option<Arc<Client>>>,
}

fn setting(name: &str, default: &str) -> String {
    env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn file(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

impl Api {
    fn new() -> io::Result<Self> {
        let mut database = Config::new();
        database.host(setting("DATABASE", "db")).user("app").dbname("postgres").connect_timeout(PATIENCE);
        database.password(file("/run/secrets/db-password")?);
        Ok(Self {
            database,
            redis: setting("REDIS", "redis:6379"),
            version: setting("VERSION", "0"),
            key: file("/run/secrets/api-key")?,
            greeting: file("/run/configs/greeting")?,
            hostname: file("/etc/hostname")?,
            client: Mutex::default(),
        })
    }

    async fn database(&self) -> Result<Arc<Client>, Error> {
        let mut client = self.client.lock().await;
        if let Some(client) = client.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let (made, connection) = self.database.connect(NoTls).await?;
        tokio::spawn(connection);
        made.batch_execute("CREATE TABLE IF NOT EXISTS hits (n bigint PRIMARY KEY, by text NOT NULL)").await?;
        Ok(Arc::clone(client.insert(Arc::new(made))))
    }

    /// One command, one line of an answer.
    async fn redis(&self, command: &str) -> Result<String, Error> {
        let mut stream = TcpStream::connect(&self.redis).await?;
        stream.write_all(format!("{command}\r\n").as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await?;
        match line.trim_end().split_at_checked(1) {
            Some((":" | "+", answer)) => Ok(answer.to_owned()),
            _ => Err(format!("redis answered {line:?}").into()),
        }
    }

    async fn answer(&self, path: &str) -> Result<String, Error> {
        match path {
            "/hit" => {
                let n: i64 = self.redis("INCR hits").await?.parse()?;
                let insert = "INSERT INTO hits (n, by) VALUES ($1, $2)";
                self.database().await?.execute(insert, &[&n, &self.hostname]).await?;
                let Self { greeting, version, key, hostname, .. } = self;
                Ok(format!("{greeting} n={n} version={version} key={key} by={hostname}"))
            }
            "/count" => {
                let row = self.database().await?.query_one("SELECT count(*) FROM hits", &[]).await?;
                Ok(row.get::<_, i64>(0).to_string())
            }
            "/health" => {
                self.redis("PING").await?;
                self.database().await?.simple_query("SELECT 1").await?;
                Ok("well".to_owned())
            }
            _ => Err(format!("there is no {path}").into()),
        }
    }

    async fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        // A header is far shorter.
        (&mut stream).take(8192).read_line(&mut line).await?;
        let mut header = line.clone();
        while !matches!(header.as_str(), "" | "\r\n" | "\n") {
            header.clear();
            (&mut stream).take(8192).read_line(&mut header).await?;
        }
        let path = line.split(' ').nth(1).unwrap_or_default();
        let answered = tokio::time::timeout(PATIENCE, self.answer(path)).await;
        let (status, text) = match answered {
            Ok(Ok(text)) => ("200 OK", text),
            Ok(Err(error)) => ("503 Service Unavailable", error.to_string()),
            Err(_) => ("504 Gateway Timeout", "too late".to_owned()),
        };
        if !status.starts_with("200") {
            eprintln!("{path}: {status}: {text}");
        }
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}\n",
            text.len() + 1
        );
        stream.get_mut().write_all(answer.as_bytes()).await?;
        stream.get_mut().shutdown().await
    }
}

async fn run() -> io::Result<()> {
    let api = Arc::new(Api::new()?);
    let listener = TcpListener::bind("[::]:8000").await?;
    let mut terminated = signal(SignalKind::terminate())?;
    let requests = TaskTracker::new();
    eprintln!("version {} serves", api.version);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let api = Arc::clone(&api);
                    requests.spawn(async move { api.serve(stream).await });
                }
                Err(error) => eprintln!("{error}"),
            },
            _ = terminated.recv() => break,
        }
    }
    drop(listener);
    requests.close();
    let _ = tokio::time::timeout(LAST, requests.wait()).await;
    Ok(())
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
