{{- define "autotts.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "autotts.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "autotts.labels" -}}
{{ include "autotts.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "autotts.isReplicated" -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) }}yes{{ end -}}
{{- end }}

{{- /* Refuse values that the proxy cannot serve as they are meant. */ -}}
{{- define "autotts.check" -}}
{{- if include "autotts.isReplicated" . -}}
{{- if eq .Values.store.kind "sqlite" -}}
{{- fail "replicas cannot share a SQLite store: set replicas to 1 and autoscaling.enabled to false, or store.kind to postgres or none" -}}
{{- end -}}
{{- if and .Values.settings.registry (not (hasPrefix "postgres" .Values.settings.registry)) -}}
{{- fail "replicas cannot share a registry in a folder: leave out settings.registry, and set store.kind to postgres or secrets.registry.name" -}}
{{- end -}}
{{- if not .Values.secrets.cacheSecret.name -}}
{{- fail "several replicas must share the secret of the prefix cache: set secrets.cacheSecret.name" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (ge (int .Values.autoscaling.episodesPerReplica) (int (.Values.settings.max_episodes | default 256))) -}}
{{- fail "no pod would ever be added: set autoscaling.episodesPerReplica to less than settings.max_episodes" -}}
{{- end -}}
{{- if and (eq .Values.store.kind "postgres") (not .Values.secrets.store.name) -}}
{{- fail "store.kind is postgres: set secrets.store.name to a Secret that holds the URL of the database" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.serviceMonitor.key.name) -}}
{{- fail "/metrics needs a client key: set serviceMonitor.key.name to a Secret that holds Prometheus' key" -}}
{{- end -}}
{{- end }}

{{- define "autotts.upstreamPorts" -}}
{{- $ports := list -}}
{{- range splitList "," .Values.upstream.url -}}
{{- $url := urlParse (trim .) -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) -}}
{{- $ports = append $ports ($port | default (eq $url.scheme "https" | ternary "443" "80")) -}}
{{- end -}}
{{- with .Values.networkPolicy.upstreamPort }}{{ $ports = list (toString .) }}{{ end -}}
{{- $ports | uniq | join " " -}}
{{- end }}
