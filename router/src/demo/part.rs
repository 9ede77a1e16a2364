//! The demo's own small programs, run inside its hosts and containers: so it needs neither a web server nor curl.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

/// Words that stand in every answer: what the demo looks for on the wire.
pub(crate) const GREETING: &str = "hello from";
/// A silent server fails the question, not the demo.
const PATIENCE: Duration = Duration::from_secs(3);
/// A request line or header longer than this is not one of ours.
const LINE_LIMIT: u64 = 8 * 1024;
const CHUNK: usize = 64 * 1024;

/// Which small program.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Part {
    /// Become a command in a named network namespace, all else unchanged
    Enter {
        netns: String,
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Answer HTTP: who I am, where I run, whom I see
    Serve {
        name: String,
        node: String,
        port: u16,
    },
    /// Resolve a name as any program would, and print the addresses
    Resolve { name: String },
    /// Ask a server some times, a new connection each; one JSON line per answer
    Get {
        host: String,
        port: u16,
        times: u32,
        /// How long a silent server is waited for, milliseconds
        #[arg(long, default_value_t = 3000)]
        patience_ms: u64,
    },
    /// Ask over one connection; prints the median round trip in microseconds
    Latency { host: String, port: u16, times: u32 },
    /// Download for some seconds; prints octets and seconds
    Load { host: String, port: u16, secs: u64 },
}

/// One answer to `get`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The body, or what went wrong.
    pub(crate) text: String,
    /// Did the server answer?
    pub(crate) ok: bool,
    /// Microseconds from the resolver's first packet to the last octet.
    pub(crate) micros: u64,
}

impl Answer {
    /// `hello from NAME on NODE to CLIENT`: the node.
    pub(crate) fn node(&self) -> Option<&str> {
        self.word_after("on")
    }

    /// The client that the server saw.
    pub(crate) fn client(&self) -> Option<&str> {
        self.word_after("to")
    }

    fn word_after(&self, word: &str) -> Option<&str> {
        let mut words = self.text.split_whitespace();
        words.find(|w| *w == word)?;
        words.next()
    }
}

/// Runs one of them.
pub(crate) fn run(part: &Part) -> anyhow::Result<()> {
    match part {
        Part::Enter { netns, command } => enter(netns, command),
        Part::Serve { name, node, port } => serve(name, node, *port),
        Part::Resolve { name } => resolve(name),
        Part::Get {
            host,
            port,
            times,
            patience_ms,
        } => get(host, *port, *times, Duration::from_millis(*patience_ms)),
        Part::Latency { host, port, times } => latency(host, *port, *times),
        Part::Load { host, port, secs } => load(host, *port, *secs),
    }
}

/// Not `ip netns exec`: that hides mounts, and the daemon's domain is one that all must see.
fn enter(netns: &str, command: &[std::ffi::OsString]) -> anyhow::Result<()> {
    let path = format!("/run/netns/{netns}");
    let file = std::fs::File::open(&path).with_context(|| format!("can't open {path}"))?;
    setns(file, CloneFlags::CLONE_NEWNET).context("can't enter the namespace")?;
    let (program, args) = command.split_first().context("no command")?;
    Err(
        anyhow!(std::process::Command::new(program).args(args).exec())
            .context("can't start the command"),
    )
}

fn serve(name: &str, node: &str, port: u16) -> anyhow::Result<()> {
    // On Linux this listens for IPv4 too, unless the machine forbids it.
    let listener =
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("ready");
    for stream in listener.incoming() {
        let (name, node) = (name.to_owned(), node.to_owned());
        let stream = stream?;
        std::thread::spawn(move || answer(&name, &node, stream));
    }
    Ok(())
}

/// Answers requests until the client goes; what goes wrong on one connection ends that connection.
fn answer(name: &str, node: &str, stream: TcpStream) -> anyhow::Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(path) = request(&mut reader)? {
        if path == "/load" {
            let chunk = vec![b'x'; CHUNK];
            write!(writer, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            while writer.write_all(&chunk).is_ok() {}
            return Ok(());
        }
        let body = format!("{GREETING} {name} on {node} to {client}\n");
        write!(
            writer,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
    Ok(())
}

/// The path of the next request, once its headers are read; `None` at the end.
fn request(reader: &mut impl BufRead) -> anyhow::Result<Option<String>> {
    let first = line(reader)?;
    if first.is_empty() {
        return Ok(None);
    }
    while !line(reader)?.trim_end().is_empty() {}
    let path = first
        .strip_prefix("GET ")
        .and_then(|rest| rest.split(' ').next());
    Ok(Some(path.context("only GET is served")?.to_owned()))
}

fn line(reader: &mut impl BufRead) -> anyhow::Result<String> {
    let mut text = String::new();
    reader.take(LINE_LIMIT).read_line(&mut text)?;
    Ok(text)
}

fn resolve(name: &str) -> anyhow::Result<()> {
    let found = (name, 0)
        .to_socket_addrs()
        .with_context(|| format!("{name} does not resolve"))?;
    let mut addrs: Vec<String> = found.map(|a| a.ip().to_string()).collect();
    addrs.dedup();
    println!("{}", addrs.join(" "));
    Ok(())
}

fn connect(host: &str, port: u16, patience: Duration) -> anyhow::Result<BufReader<TcpStream>> {
    let mut last = anyhow!("{host} has no address");
    for addr in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, patience) {
            Ok(stream) => {
                stream.set_read_timeout(Some(patience))?;
                stream.set_nodelay(true)?;
                return Ok(BufReader::new(stream));
            }
            Err(e) => last = anyhow!("{addr}: {e}"),
        }
    }
    Err(last)
}

fn ask(stream: &mut BufReader<TcpStream>, host: &str) -> anyhow::Result<String> {
    write!(stream.get_mut(), "GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let status = line(stream)?;
    ensure!(
        status.starts_with("HTTP/1.1 200"),
        "answered \"{}\"",
        status.trim_end()
    );
    let mut length = 0;
    loop {
        let header = line(stream)?;
        let header = header.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("Content-Length: ") {
            length = value.parse::<usize>()?.min(CHUNK);
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(String::from_utf8_lossy(&body).trim_end().to_owned())
}

fn get(host: &str, port: u16, times: u32, patience: Duration) -> anyhow::Result<()> {
    for _ in 0..times {
        let start = Instant::now();
        let outcome = connect(host, port, patience).and_then(|mut stream| ask(&mut stream, host));
        let ok = outcome.is_ok();
        let text = outcome.unwrap_or_else(|e| format!("{e:#}"));
        println!(
            "{}",
            serde_json::to_string(&Answer {
                text,
                ok,
                micros: micros(start)
            })?
        );
    }
    Ok(())
}

fn latency(host: &str, port: u16, times: u32) -> anyhow::Result<()> {
    let mut stream = connect(host, port, PATIENCE)?;
    let mut all = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        ask(&mut stream, host)?;
        all.push(micros(start));
    }
    all.sort_unstable();
    let median = all.get(all.len() / 2).context("no measurement")?;
    println!("{median}");
    Ok(())
}

fn load(host: &str, port: u16, secs: u64) -> anyhow::Result<()> {
    let mut stream = connect(host, port, PATIENCE)?;
    write!(
        stream.get_mut(),
        "GET /load HTTP/1.1\r\nHost: {host}\r\n\r\n"
    )?;
    let (start, mut octets) = (Instant::now(), 0);
    let mut buffer = vec![0; CHUNK];
    while start.elapsed() < Duration::from_secs(secs) {
        match stream.get_mut().read(&mut buffer)? {
            0 => bail!("the server closed"),
            n => octets += n,
        }
    }
    println!("{octets} {}", start.elapsed().as_secs_f64());
    Ok(())
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_the_node_and_the_client() {
        let text = format!("{GREETING} web on alpha to 192.0.2.1");
        let answer = Answer {
            text,
            ok: true,
            micros: 1,
        };
        assert_eq!(answer.node(), Some("alpha"));
        assert_eq!(answer.client(), Some("192.0.2.1"));
        let answer = Answer {
            text: "refused".to_owned(),
            ok: false,
            micros: 1,
        };
        assert_eq!(answer.node(), None);
    }

    #[test]
    fn the_server_answers_several_requests_on_one_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server =
            std::thread::spawn(move || answer("web", "alpha", listener.accept().unwrap().0));
        let mut stream = connect("127.0.0.1", port, PATIENCE).unwrap();
        for _ in 0..3 {
            assert_eq!(
                ask(&mut stream, "x").unwrap(),
                format!("{GREETING} web on alpha to 127.0.0.1")
            );
        }
        drop(stream);
        server.join().unwrap().unwrap();
    }

    #[test]
    fn an_endless_request_line_is_not_read_to_its_end() {
        let mut endless = BufReader::new(std::io::repeat(b'a').take(1 << 30));
        assert!(line(&mut endless).unwrap().len() as u64 <= LINE_LIMIT);
    }
}
