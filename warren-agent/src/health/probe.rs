use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, DigitallySignedStruct, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
        pki_types::{CertificateDer, ServerName, UnixTime},
    },
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use warren_proto::v1::{self, health_check::Check};

use crate::{network, runtime::Containerd};

/// What a check asks, and of whom.
pub(super) struct Probe {
    pub(super) containerd: Containerd,
    pub(super) container: String,
    /// The container's network.
    pub(super) namespace: PathBuf,
    /// Its own address there; loopback if it has none.
    pub(super) address: IpAddr,
    pub(super) check: Check,
    pub(super) timeout: Duration,
}

/// As the label `type` has it.
pub(super) fn kind(check: &Check) -> &'static str {
    match check {
        Check::Http(http) if http.tls => "https",
        Check::Http(_) => "http",
        Check::Tcp(_) => "tcp",
        Check::Exec(_) => "exec",
        Check::Grpc(_) => "grpc",
    }
}

impl Probe {
    /// Asks once; says what is wrong.
    pub(super) async fn run(&self) -> Result<(), String> {
        if let Check::Exec(exec) = &self.check {
            // It has the time limit itself, and ends what exceeds it.
            return self.exec(exec).await;
        }
        let asked = tokio::time::timeout(self.timeout, self.ask()).await;
        asked.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)))
    }

    async fn ask(&self) -> Result<(), String> {
        match &self.check {
            Check::Http(http) => self.http(http).await,
            Check::Tcp(tcp) => self.connect(tcp.port).await.map(drop),
            Check::Grpc(grpc) => self.grpc(grpc).await,
            Check::Exec(_) => Ok(()),
        }
    }

    async fn connect(&self, port: u32) -> Result<TcpStream, String> {
        let port = u16::try_from(port).map_err(|_| format!("there is no port {port}"))?;
        let (namespace, is_v4) = (self.namespace.clone(), self.address.is_ipv4());
        let made = tokio::task::spawn_blocking(move || network::tcp_socket(&namespace, is_v4)).await;
        let failed = |error: io::Error| format!("connecting to port {port}: {error}");
        let socket = made.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())).map_err(failed)?;
        socket.connect(SocketAddr::new(self.address, port)).await.map_err(failed)
    }

    async fn http(&self, check: &v1::HttpCheck) -> Result<(), String> {
        let stream = self.connect(check.port).await?;
        if !check.tls {
            return self.get(stream, check).await;
        }
        // Whoever answers is who it is by its address: the certificate may be anybody's, as it is for Kubernetes.
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let config = config.map_err(|error| error.to_string())?;
        let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)));
        let name = ServerName::from(self.address);
        let tls = TlsConnector::from(Arc::new(config.with_no_client_auth())).connect(name, stream).await;
        self.get(tls.map_err(|error| format!("TLS: {error}"))?, check).await
    }

    async fn get(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        check: &v1::HttpCheck,
    ) -> Result<(), String> {
        let failed = |error: hyper::Error| format!("HTTP: {error}");
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let path = if check.path.is_empty() { "/" } else { &check.path };
        let mut request = Request::get(path).header("user-agent", "warren-health");
        let own = check.headers.keys().any(|name| name.eq_ignore_ascii_case(HOST.as_str()));
        if !own {
            request = request.header(HOST, SocketAddr::new(self.address, check.port as u16).to_string());
        }
        for (name, value) in &check.headers {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await;
        let status = answer.map_err(failed)?.status();
        // A redirection is an answer too; it is not followed.
        if status.is_success() || status.is_redirection() { Ok(()) } else { Err(format!("HTTP status {status}")) }
    }

    async fn grpc(&self, check: &v1::GrpcCheck) -> Result<(), String> {
        let stream = self.connect(check.port).await?;
        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| io::Error::other("the connection was lost"));
            async move { stream }
        });
        let channel = Endpoint::from_static("http://container").connect_with_connector(connector).await;
        let channel = channel.map_err(|error| format!("gRPC: {error}"))?;
        let request = HealthCheckRequest { service: check.service.clone() };
        match HealthClient::new(channel).check(request).await {
            Ok(answer) => match answer.into_inner().status() {
                ServingStatus::Serving => Ok(()),
                status => Err(format!("gRPC: {}", status.as_str_name())),
            },
            Err(status) if status.code() == Code::Unimplemented => {
                Err("gRPC: the server does not implement grpc.health.v1.Health".to_owned())
            }
            Err(status) => Err(format!("gRPC: {}", status.message())),
        }
    }

    async fn exec(&self, check: &v1::ExecCheck) -> Result<(), String> {
        let ran = self.containerd.run_in(&self.container, &check.command, self.timeout).await;
        match ran.map_err(|error| error.to_string())? {
            Some(0) => Ok(()),
            Some(code) => Err(format!("the command exited with code {code}")),
            None => Err(format!("the command took longer than {:?}", self.timeout)),
        }
    }
}

/// A container's own address, seen from inside.
pub(super) fn own_address(addresses: &[String]) -> IpAddr {
    let first = addresses.iter().find_map(|address| address.parse().ok());
    first.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// Takes whatever certificate there is.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, tokio_rustls::rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
