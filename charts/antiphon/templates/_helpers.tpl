{{/* Names, labels, images and security contexts. */}}

{{- define "antiphon.fullname" -}}
{{- $name := printf "%s-%s" .Release.Name .Chart.Name }}
{{- if contains .Chart.Name .Release.Name }}{{ $name = .Release.Name }}{{ end }}
{{- $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Of objects without a namespace: several releases may share a cluster. */}}
{{- define "antiphon.clusterName" -}}
{{ include "antiphon.fullname" .root }}-{{ .name }}:{{ .root.Release.Namespace }}
{{- end }}

{{/* {root, component}. */}}
{{- define "antiphon.selector" -}}
app.kubernetes.io/name: antiphon
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* {root, component}. */}}
{{- define "antiphon.labels" -}}
{{ include "antiphon.selector" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* {root, name}: REGISTRY/REPOSITORY:TAG, or @DIGEST. etcd does not follow images.tag. */}}
{{- define "antiphon.image" -}}
{{- $images := .root.Values.images }}
{{- $image := get $images .name }}
{{- $tag := $image.tag }}
{{- if and (not $tag) (ne .name "etcd") }}{{ $tag = $images.tag | default .root.Chart.AppVersion }}{{ end }}
{{- with $images.registry }}{{ . | trimSuffix "/" }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $tag }}{{ end }}
{{- end }}

{{- define "antiphon.pullSecrets" -}}
{{- with .Values.images.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What the restricted Pod Security profile asks for, of a pod and of a container. */}}
{{- define "antiphon.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "antiphon.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Namespaces besides the release's that the operator serves, as JSON; empty: all. */}}
{{- define "antiphon.namespaces" -}}
{{- $all := list }}
{{- if eq .Values.rbac.scope "namespaces" }}
{{- $all = prepend .Values.rbac.namespaces .Release.Namespace | uniq }}
{{- end }}
{{- $all | toJson }}
{{- end }}

{{/* 140 and more random bits as ak_ID_SECRET in Crockford's base32: 12 and 32 characters. */}}
{{- define "antiphon.newApiKey" -}}
{{- $text := randBytes 40 | b64dec | b32enc | lower | replace "i" "0" | replace "l" "1" | replace "o" "8" | replace "u" "9" -}}
ak_{{ substr 0 12 $text }}_{{ substr 12 44 $text }}
{{- end }}

{{- define "antiphon.etcdConfig" -}}
data-dir: /var/lib/etcd/data
initial-cluster-token: {{ .Release.Namespace }}/{{ include "antiphon.fullname" . }}
quota-backend-bytes: {{ int64 .Values.etcd.managed.quotaBytes }}
auto-compaction-mode: periodic
auto-compaction-retention: {{ .Values.etcd.managed.compactionRetention | quote }}
strict-reconfig-check: true
logger: zap
log-outputs: [stderr]
client-transport-security:
  cert-file: /etc/etcd/tls/tls.crt
  key-file: /etc/etcd/tls/tls.key
  trusted-ca-file: /etc/etcd/tls/ca.crt
  client-cert-auth: true
peer-transport-security:
  cert-file: /etc/etcd/tls/tls.crt
  key-file: /etc/etcd/tls/tls.key
  trusted-ca-file: /etc/etcd/tls/ca.crt
  client-cert-auth: true
{{- end }}

{{- define "antiphon.operatorArguments" -}}
{{- $etcd := .Values.etcd }}
{{- $name := include "antiphon.fullname" . -}}
- run
- --cluster={{ .Values.cluster }}
- --namespace={{ .Release.Namespace }}
- --instance={{ .Release.Name }}
{{- range include "antiphon.namespaces" . | fromJsonArray }}
- --watch-namespace={{ . }}
{{- end }}
{{- if eq .Values.rbac.scope "namespaces" }}
- --watch-nodes=false
{{- end }}
{{- range list "router" "relay" "worker" }}
- --{{ . }}-image={{ include "antiphon.image" (dict "root" $ "name" .) }}
{{- end }}
- --image-pull-policy={{ .Values.images.pullPolicy }}
{{- range .Values.images.pullSecrets }}
- --image-pull-secret={{ . }}
{{- end }}
- --router-resources={{ toJson .Values.routers.resources }}
- --relay-resources={{ toJson .Values.relays.resources }}
- --root-secret={{ .Values.fleetRoot.secret }}
{{- if .Values.certificates.issuerKind }}
- --cert-manager-issuer={{ .Values.certificates.issuerKind }}/{{ .Values.certificates.issuerName }}
- --operator-identity=/etc/antiphon/identity
{{- else }}
- --issuer=/etc/antiphon/issuer
{{- end }}
{{- if eq $etcd.mode "managed" }}
{{- range until (int $etcd.managed.members) }}
- --etcd-endpoints=https://{{ $name }}-etcd-{{ . }}.{{ $name }}-etcd.{{ $.Release.Namespace }}.svc:2379
{{- end }}
- --etcd-secret={{ $etcd.managed.clientTlsSecret | default (printf "%s-etcd-client-tls" $name) }}
- --etcd-prefix=/antiphon
{{- else }}
{{- range $etcd.external.endpoints }}
- --etcd-endpoints={{ . }}
{{- end }}
{{- with $etcd.external.tlsSecret }}
- --etcd-secret={{ . }}
{{- end }}
{{- if and $etcd.external.tlsSecret (not $etcd.external.clientCertificate) }}
- --etcd-ca-only
{{- end }}
{{- with $etcd.external.userSecret }}
- --etcd-user-secret={{ . }}
{{- end }}
- --etcd-prefix={{ $etcd.external.prefix }}
{{- end }}
{{- range .Values.operator.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
