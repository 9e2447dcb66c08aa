//! What connections are made of: TLS 1.3, HTTP/2, and whom to believe.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

use crate::{Error, Identity, token};

/// The name in every manager's certificate.
pub(crate) const MANAGER_NAME: &str = "warren-manager";
const PROTOCOL: &[u8] = b"h2";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authorities: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|error| Error::unusable("the authority's certificate", error))?;
    }
    Ok(Arc::new(roots))
}

/// What a manager answers connections with. Whoever calls may have no certificate, or one of these authorities.
pub(crate) fn server(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: &[CertificateDer<'static>],
) -> Result<ServerConfig, Error> {
    let unusable = |error: rustls::Error| Error::unusable("the certificate", error);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authorities)?, provider());
    let verifier = verifier.allow_unauthenticated().build();
    let verifier = verifier.map_err(|error| Error::unusable("the authority's certificate", error))?;
    let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]);
    let config = config.map_err(unusable)?.with_client_cert_verifier(verifier);
    let mut config = config.with_single_cert(chain, key).map_err(unusable)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // Nobody resumes a session that began with another certificate.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What calls managers of these authorities, as whom the certificate says.
pub(crate) fn client(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: &[CertificateDer<'static>],
) -> Result<ClientConfig, Error> {
    let unusable = |error: rustls::Error| Error::unusable("the certificate", error);
    let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]);
    let config = config.map_err(unusable)?.with_root_certificates(roots(authorities)?);
    let mut config = config.with_client_auth_cert(chain, key).map_err(unusable)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

/// What calls a manager of the authority that a token names, as nobody yet.
pub(crate) fn newcomer(token: &token::Token) -> Result<ClientConfig, Error> {
    let unusable = |error: rustls::Error| Error::unusable("the certificate", error);
    let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]);
    let verifier = Arc::new(Invited { digest: token.digest(), provider: provider() });
    let config = config.map_err(unusable)?.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

/// Believes the authority of this digest, which managers show beside their own certificate, and whom it has signed.
#[derive(Debug)]
struct Invited {
    digest: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Invited {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates.iter().find(|certificate| token::digest(certificate) == self.digest);
        let Some(authority) = authority else {
            return Err(rustls::Error::General(
                "it is not of the cluster that the token is for, or has another authority since".to_owned(),
            ));
        };
        let roots = roots(&[authority.clone().into_owned()]);
        let roots = roots.map_err(|error| rustls::Error::General(error.to_string()))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider)).build();
        let verifier = verifier.map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// A certificate's subject, and when it begins and ends to be valid, in seconds since the Unix epoch.
pub(crate) fn read(certificate: &[u8]) -> Result<(Identity, i64, i64), Error> {
    let unusable = |why: &str| Error::unusable("the certificate", why);
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).map_err(|_| unusable("it is damaged"))?;
    let subject = certificate.subject();
    let one = |mut attributes: Box<dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>> + '_>| {
        attributes.next().and_then(|attribute| attribute.as_str().ok()).map(str::to_owned)
    };
    let cluster = one(Box::new(subject.iter_organization())).ok_or_else(|| unusable("it names no cluster"))?;
    let role =
        one(Box::new(subject.iter_organizational_unit())).ok_or_else(|| unusable("it names no role"))?.parse()?;
    let id = one(Box::new(subject.iter_common_name())).ok_or_else(|| unusable("it names no one"))?;
    let validity = certificate.validity();
    Ok((Identity { cluster, role, id }, validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Whether a certificate, in PEM, is an authority's and of this key.
pub(crate) fn check_authority(certificate: &str, public_key: &[u8]) -> Result<(), Error> {
    let unusable = |why: &str| Error::unusable("the authority's certificate", why);
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| unusable("it is damaged"))?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&certificate).map_err(|_| unusable("it is damaged"))?;
    if !certificate.is_ca() {
        return Err(unusable("it is not an authority's"));
    }
    if certificate.public_key().raw != public_key {
        return Err(unusable("it is of another key"));
    }
    Ok(())
}
